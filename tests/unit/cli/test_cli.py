"""The command line as a user meets it: subprocesses, exit codes, one message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import experiment
import pytest
import tiny

from pipeline import cli as program
from pipeline.errors import ConfigError


def cli(*arguments: str, cwd: Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={
            **environment,
            "COLUMNS": "160",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
            **env,
        },
    )


def refused(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    return result.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiment.write(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def done(config: Path) -> subprocess.CompletedProcess[str]:
    """A finished `reproduce`, as a user would run it."""
    return cli("reproduce", "experiment.yaml", "--set", "train.seeds=[10]", cwd=config.parent)


def test_reproduce_leaves_the_comparison_and_prints_it(config: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    for word in ("teacher", "untrained", "sft", "kd", "mse", "distilllens", "report.html", "distilllens ui"):
        assert word in done.stdout
    comparison = config.parent / "runs" / "tiny" / "comparison"
    assert (comparison / "results.csv").is_file()
    headline = (comparison / "headline.txt").read_text().split()
    assert len(headline) > 5 and " ".join(headline) in " ".join(done.stdout.split())
    assert "\x1b[" not in done.stdout + done.stderr  # no bars, no colours where there is no terminal


def test_everything_stays_in_the_run_directory(config: Path, done: subprocess.CompletedProcess[str]) -> None:
    made = {path.name for path in config.parent.iterdir()}
    assert made == {"teacher", "train.jsonl", "dev.jsonl", "general.jsonl", "tasks.jsonl", "experiment.yaml", "runs"}
    assert {path.name for path in (config.parent / "runs").iterdir()} == {
        ".prefect",
        "artifacts",
        "mlartifacts",
        "mlflow.db",
        "tiny",
    }
    leftovers = [
        p for p in (config.parent / "runs" / "artifacts").rglob("*") if p.name.endswith((".partial", ".lock", ".fresh", ".tmp"))
    ]
    assert leftovers == []


def test_a_second_run_starts_no_engine(config: Path, done: subprocess.CompletedProcess[str]) -> None:
    code = (
        "import sys; sys.argv = ['distilllens', 'reproduce', 'experiment.yaml', '--set', 'train.seeds=[10]']\n"
        "from pipeline import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: print('code', end.code, 'prefect' in sys.modules, 'mlflow' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
    again = subprocess.run(
        [sys.executable, "-c", code], cwd=config.parent, capture_output=True, text=True, timeout=120, env=environment
    )
    assert "code 0 False False" in again.stdout, again.stderr
    assert "distilllens" in again.stdout


def test_validate_shows_the_plan_before_and_after(config: Path, done: subprocess.CompletedProcess[str]) -> None:
    before = cli("validate", "experiment.yaml", "--run-dir", "elsewhere", cwd=config.parent)
    assert before.returncode == 0 and before.stdout.count("to do") == 3 + 1 + 1 + 8 + 20 + 1 and "≈" in before.stdout
    assert not (config.parent / "elsewhere").exists()
    after = cli("validate", "experiment.yaml", cwd=config.parent)
    assert after.returncode == 0 and after.stdout.count("cached") == 3 + 1 + 1 + 4 + 12


def test_cache_estimate_runs_nothing(config: Path) -> None:
    result = cli("cache", "experiment.yaml", "--estimate", "--run-dir", "elsewhere", cwd=config.parent)
    assert result.returncode == 0 and re.search(
        r"about [\d.]+ MiB for 24 rows.*, about \d+:\d\d:\d\d on this machine", result.stdout
    )
    assert not (config.parent / "elsewhere").exists()


def test_compare_needs_evaluations(config: Path) -> None:
    assert "16 artifacts are missing" in refused(
        cli("compare", "experiment.yaml", "--set", "train.seeds=[10]", "--run-dir", "none", cwd=config.parent)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "absent.yaml"], "absent.yaml"),
        (
            ["reproduce", "experiment.yaml", "--set", "methods.distilllens.lens.wieght=2"],
            "methods.distilllens.lens.wieght: unknown key; did you mean weight?",
        ),
        (["reproduce", "experiment.yaml", "--set", "train.batch_size=abc"], "train.batch_size: "),
        (["reproduce", "experiment.yaml", "--set", "teacher.path=nowhere"], "teacher.path: nowhere is not a folder"),
        (["reproduce", "experiment.yaml", "--set", "data.train.path=nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["reproduce", "experiment.yaml", "--set", "methods.distilllens.lens.pairs.count=9"],
            "methods.distilllens.lens.pairs: 9 pairs",
        ),
        (
            ["reproduce", "experiment.yaml", "--set", "methods.distilllens.lens.pairs={kind: explicit, pairs: [[1, 7]]}"],
            "teacher layer 7 does not exist",
        ),
        (
            ["reproduce", "experiment.yaml", "--set", "student.keep_layers=7"],
            "student.keep_layers: 7, but the teacher has 6 layers",
        ),
        (
            ["reproduce", "experiment.yaml", "--set", "data.train={kind: hub, repo: a/b, file: x.jsonl, revision: main}"],
            "data.train: cannot resolve a/b@main",
        ),
        (
            ["reproduce", "experiment.yaml", "--set", "teacher={kind: hub, repo: a/b, revision: main}"],
            "teacher: cannot resolve a/b@main",
        ),
        (["reproduce", "experiment.yaml", "--run-dir", "/proc/none"], "--run-dir: /proc/none cannot be written"),
        (["reproduce", "experiment.yaml", "--set", "train.batch_size=25"], "train.batch_size: 25 rows, but"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(config: Path, arguments: list[str], message: str) -> None:
    result = cli(
        *arguments,
        *([] if "--run-dir" in arguments or arguments == ["frobnicate"] else ["--run-dir", "bad"]),
        cwd=config.parent,
    )
    assert message in refused(result)


def test_a_run_directory_that_cannot_be_made_is_refused_before_an_engine_starts() -> None:
    with pytest.raises(ConfigError, match=r"--run-dir: /proc/none cannot be written \(.*\); choose another with --run-dir"):
        with program._engine(Path("/proc/none")):
            raise AssertionError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"instruction": "a", "output": "b"}\nnot json\n', "rows.jsonl:2"),
        ('{"output": "b"}\n', "instruction"),
        ('{"instruction": 3, "output": "b"}\n', "instruction"),
    ],
)
def test_bad_rows_are_named_with_their_line(config: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    result = cli(
        "validate",
        str(config),
        "--set",
        f"data.train.path={tmp_path / 'rows.jsonl'}",
        "--run-dir",
        str(tmp_path / "r"),
        cwd=tmp_path,
    )
    assert message in refused(result) and not (tmp_path / "r").exists()


def test_models_that_do_not_fit_are_refused(config: Path, tmp_path: Path) -> None:
    other = tiny.save(tiny.llama(layers=3, vocab=200), tmp_path / "other")
    student = f"student={{kind: pretrained, model: {{kind: local, path: {other}}}}}"
    result = cli("reproduce", str(config), "--set", student, "--run-dir", str(tmp_path / "r"), cwd=tmp_path)
    assert "vocabularies differ" in refused(result)


def test_the_ui_needs_a_store(tmp_path: Path) -> None:
    assert "has no mlflow.db" in refused(cli("ui", "--run-dir", str(tmp_path), cwd=tmp_path))


def test_lens_shows_both_models_and_writes_its_files(tmp_path: Path) -> None:
    teacher, student = (
        tiny.save(tiny.llama(layers=6), tmp_path / "teacher"),
        tiny.save(tiny.llama(layers=4), tmp_path / "student"),
    )
    arguments = ("lens", str(student), "--teacher", str(teacher), "--prompt", "the cat sat", "--out", "heat")
    result = cli(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "teacher" in result.stdout and "student" in result.stdout
    for suffix in ("png", "svg", "json"):
        assert (tmp_path / f"heat.{suffix}").stat().st_size > 0
    assert "no-such-folder" in refused(cli("lens", "no-such-folder", *arguments[2:], cwd=tmp_path))
