"""Doctor: every check on a machine that is made up, and a table that fits a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline import doctor
from pipeline.doctor import Finding, examine, exit_code, render

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server of the user's, and no hub, unless a test says so."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "HF_ENDPOINT", "CXX", "DISTILLLENS_NO_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "no-profile"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Made-up /proc and /sys/fs/cgroup, as folders proc and cgroup."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(doctor, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path / "cgroup")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Health(BaseHTTPRequestHandler):
    """Answers /health and /api/health; anything else is unknown."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path in ("/health", "/api/health") else 404)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path in ("", "/") else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    listening = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def found(run_dir: Path, name: str) -> Finding:
    return next(finding for finding in examine(run_dir) if finding.name == name)


def requirements(monkeypatch: pytest.MonkeyPatch, lines: list[str], versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "requires", lambda _: lines)
    monkeypatch.setattr(doctor.metadata, "version", version)


def test_this_machine_can_run(tmp_path: Path) -> None:
    findings = examine(tmp_path / "runs")
    assert exit_code(findings) == 0 and not (tmp_path / "runs").exists()
    assert {"python", "packages", "device", "precision", "compiler", "threads", "memory", "disk", "run directory"} < {
        finding.name for finding in findings
    }
    assert all(finding.advice for finding in findings if finding.status != "ok")


def test_heavy_packages_are_not_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.doctor import examine; examine(Path('.'))\n"
        "print(*sorted({'transformers', 'prefect', 'mlflow', 'peft', 'ray', 'dask', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""


def test_unmet_requirements_are_problems_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.9", "fastapi<0.150,>=0.139", "gguf>=0.17", 'peft<1,>=0.21; extra == "lora"']
    requirements(monkeypatch, lines, {"torch": "2.13.0+cpu", "fastapi": "0.151.0"})
    fastapi, gguf = doctor._packages()
    assert (fastapi.name, fastapi.status) == ("fastapi", "problem") and "0.151.0, needs <0.150,>=0.139" in fastapi.found
    assert gguf.status == "problem" and 'pip install -c constraints.txt "gguf>=0.17"' in gguf.advice
    requirements(monkeypatch, lines, {"torch": "2.13.0+cpu", "fastapi": "0.149.1", "gguf": "0.17"})
    (met,) = doctor._packages()
    assert met.status == "ok" and met.found == "all 3 requirements are met; torch 2.13.0+cpu"


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DISTRIBUTION", "no-such-distribution")
    (finding,) = doctor._packages()
    assert finding.status == "note" and "pip install" in finding.advice
    assert doctor._python().status == "ok"


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "metadata", lambda _: {"Requires-Python": ">=3.11"})
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    finding = doctor._python()
    assert finding.status == "problem" and finding.found == "3.10.4, needs >=3.11"


def test_a_broken_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"lib{name}_cpu.so: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (finding,) = doctor._computing()
    assert finding.status == "problem" and "libtorch_cpu.so" in finding.found and exit_code([finding]) == 1


def cuda(capability: tuple[int, int], count: int = 1) -> Any:
    properties = SimpleNamespace(name="Tiny GPU", total_memory=24 * 2**30, major=capability[0], minor=capability[1])
    return SimpleNamespace(
        __version__="2.13.0",
        cuda=SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: count,
            get_device_properties=lambda _: properties,
            get_device_capability=lambda _: capability,
        ),
    )


def test_a_cuda_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor._device(cuda((9, 0), count=3))
    assert finding == Finding("device", "ok", "CUDA: Tiny GPU, 24 GiB, compute capability 9.0, and 2 more")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._precision(cuda((9, 0))) == Finding("precision", "ok", "train.precision=auto is bfloat16 autocast here")
    old = doctor._precision(cuda((7, 5)))
    assert old.status == "note" and old.advice == "set train.precision=fp32"


def test_a_cpu_is_named_with_its_instructions(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(kernel / "proc" / "cpuinfo", "processor : 0\nmodel name\t: Tiny CPU\nflags\t\t: fpu avx2 avx512f amx_bf16 sse\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    finding = doctor._device(torch)
    assert finding.status == "note" and finding.found == "CPU: Tiny CPU (avx2, avx512f, amx_bf16)"
    assert doctor._precision(torch).found == "train.precision=auto is float32 here"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "install a CUDA build of torch" in doctor._device(torch).advice


def test_the_compiler_is_looked_for_as_torch_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = {"g++", "clang++", "myc++"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "no Python.h" in doctor._compiler(torch).found
    (tmp_path / "Python.h").touch()
    assert doctor._compiler(torch) == Finding("compiler", "ok", "g++")
    monkeypatch.setenv("CXX", "myc++")
    assert doctor._compiler(torch).found == "myc++"
    there.clear()
    assert doctor._compiler(torch).status == "note" and "no myc++" in doctor._compiler(torch).found
    monkeypatch.setenv("DISTILLLENS_NO_COMPILE", "1")
    assert doctor._compiler(torch).advice == "unset DISTILLLENS_NO_COMPILE"


def test_on_cuda_the_compiler_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    assert doctor._compiler(cuda((9, 0))).advice == "pip install triton"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: SimpleNamespace())
    assert doctor._compiler(cuda((9, 0))) == Finding("compiler", "ok", "Triton")


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/not/visible/here\n", {"cpu.max": "400000 100000"}, 4),
        ("3:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
        ("", {}, 8),
    ],
)
def test_a_containers_quota_counts(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write(kernel / "proc" / "self" / "cgroup", groups)
    for name, text in files.items():
        write(kernel / "cgroup" / name, text)
    many = doctor._threads(SimpleNamespace(get_num_threads=lambda: 64))
    assert f"on {cores} usable core" in many.found and many.advice == f"set OMP_NUM_THREADS={cores}"
    assert doctor._threads(SimpleNamespace(get_num_threads=lambda: cores)).status == "ok"


def test_too_few_threads_are_a_note(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finding = doctor._threads(SimpleNamespace(get_num_threads=lambda: 1))
    assert finding.status == "note" and "OMP_NUM_THREADS is 1; unset it" in finding.advice
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "set OMP_NUM_THREADS=2" in doctor._threads(SimpleNamespace(get_num_threads=lambda: 1)).advice


def test_memory_is_the_machines_or_the_containers(kernel: Path) -> None:
    assert doctor._memory() == Finding("memory", "ok", "8.0 of 16.0 GiB available")
    write(kernel / "proc" / "self" / "cgroup", "5:memory:/job\n0::/job\n")
    write(kernel / "cgroup" / "job" / "memory.max", "max\n")
    assert doctor._memory().status == "ok"
    write(kernel / "cgroup" / "memory.max", str(6 * 2**30))
    assert doctor._memory().found == "6.0 of 6.0 GiB available, the limit of its container"
    write(kernel / "cgroup" / "memory" / "job" / "memory.limit_in_bytes", str(2 * 2**30))
    small = doctor._memory()
    assert small.status == "note" and small.found.startswith("2.0 of 2.0") and "micro_batch_size" in small.advice
    (kernel / "proc" / "meminfo").unlink()
    assert doctor._memory().found.startswith("2.0 of 2.0")


def test_a_full_disk_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**30))
    finding = doctor._disk(tmp_path / "runs")
    assert finding.status == "note" and "3.0 GiB free" in finding.found and "--run-dir" in finding.advice


def test_a_run_directory_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._writable(tmp_path / "a" / "b").status == "ok" and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert doctor._writable(tmp_path / "file").status == "problem"
    assert doctor._writable(tmp_path / "file" / "runs").status == "problem"

    def refuse(dir: Path) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor._writable(tmp_path / "runs")
    assert finding.status == "problem" and "Read-only file system" in finding.found and exit_code([finding]) == 1


def test_servers_that_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{server}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server}/")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", server)
    findings = {finding.name: finding for finding in examine(tmp_path)}
    for name in ("Prefect", "MLflow", "hub"):
        assert findings[name].status == "ok" and "answers in" in findings[name].found, findings[name]
    assert exit_code(list(findings.values())) == 0


def test_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{server}/wrong")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    findings = {finding.name: finding for finding in examine(tmp_path)}
    assert findings["Prefect"].status == "problem" and "answers 404" in findings["Prefect"].found
    assert findings["MLflow"].status == "note" and "refused" in findings["MLflow"].found
    assert findings["hub"].status == "note" and "local" in findings["hub"].advice
    assert exit_code(list(findings.values())) == 1


def test_a_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = threading.Event()
    monkeypatch.setattr(doctor, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "_ask", lambda _: ended.wait(60) and None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    finding = found(tmp_path, "MLflow")
    ended.set()
    assert finding.status == "note" and "no answer in" in finding.found


def test_a_wrong_address_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "localhost:4200/api")
    finding = found(tmp_path, "Prefect")
    assert finding.status == "problem" and "unset PREFECT_API_URL" in finding.advice


def test_no_servers_of_the_users_own(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in examine(tmp_path)}
    assert findings["Prefect"].status == findings["MLflow"].status == "ok"
    assert str(tmp_path / "mlflow.db") in findings["MLflow"].found
    assert findings["hub"].status == "note" and "HF_HUB_OFFLINE" in findings["hub"].found


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/mlflow")
    monkeypatch.setenv("PREFECT_API_URL", "http://me:secret@127.0.0.1:1/api")
    shown = str(examine(tmp_path))
    assert "secret" not in shown and "//…@db/mlflow" in shown and "//…@127.0.0.1:1" in shown


def test_optional_packages_are_named_with_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['peft<1,>=0.21; extra == "test"', 'peft<1,>=0.21; extra == "lora"', "torch>=2.9"]
    requirements(monkeypatch, lines, {"optuna": "5.0.0"})
    findings = {finding.name: finding for finding in doctor._optional()}
    assert findings["optional"].found == "optuna 5.0.0"
    assert findings["peft"].advice == 'for adapters (train.lora): pip install "distilllens-pipeline[lora]"'
    assert findings["vllm"].status == "note" and findings["vllm"].advice.endswith("pip install vllm")


def test_the_quickstarts_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    missing = doctor._teacher()
    assert missing.status == "note" and "make fetch" in missing.advice
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: SimpleNamespace())
    assert doctor._teacher().status == "ok"


@pytest.mark.parametrize(
    ("answers", "status", "text"),
    [
        ({"rev-parse": "abc123", "status": ""}, "ok", "git commit abc123"),
        ({"rev-parse": "abc123", "status": " M file"}, "note", "git commit abc123 with changes"),
        ({}, "note", "not in a git checkout"),
    ],
)
def test_the_commit_of_the_code(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], status: str, text: str) -> None:
    monkeypatch.setattr(doctor, "_git", lambda *arguments: answers.get(arguments[0]))
    finding = doctor._checkout()
    assert (finding.status, finding.found) == (status, text)


def test_git_that_fails_or_is_missing_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._git("no-such-command") is None
    monkeypatch.setenv("PATH", "")
    assert doctor._git("rev-parse", "HEAD") is None


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_shows_everything(width: int) -> None:
    findings = [
        Finding("peft", "note", "not installed", 'for adapters: pip install "it[lora]"'),
        Finding("run directory", "problem", "/a/very/long/path" * 6 + " cannot be written", "choose another"),
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(render(findings))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    # Brackets are no markup, and nothing is cut off.
    assert '"it[lora]"' in text and "…" not in text
    assert "1 problem" in text
    out.truncate(0)
    Console(file=out, width=width).print(render([findings[0]]))
    assert "ready to run; 1 note" in out.getvalue()
