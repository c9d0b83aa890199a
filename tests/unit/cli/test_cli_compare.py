"""`compare RUN...` from beginning to end: two tiny experiments, compared where nothing but their comparisons is left."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import stages

from pipeline import cli
from pipeline.artifacts import MANIFEST
from pipeline.errors import ArtifactError, ConfigError, DataError, PipelineError
from pipeline.plan import Plan
from pipeline.reporting import report
from pipeline.reporting.record_files import FILES, GENERATIONS
from pipeline.stages import compare, prepare, student
from pipeline.tracking import stage_experiment

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Made:
    """Run directories with their comparisons alone, and a store that has the first two; `c` follows another protocol."""

    a: Path
    b: Path
    c: Path
    store: Path


def finished(folder: Path, name: str, *overrides: str, **changes: object) -> Plan:
    """A whole experiment, without an engine and a tracker."""
    plan = stages.planned(folder, f"name={name}", "validation.select=loss", "train.max_steps=2", *overrides, **changes)
    prepare.run(plan.data)
    student.run(plan.student)
    for benchmark in plan.benchmarks:
        prepare.run_benchmark(benchmark)
    stages.run_trials(plan)
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        compare.run(plan.comparison)
    return plan


def without_figures(patch: pytest.MonkeyPatch) -> None:
    """They take seconds each time; the fixture `merged` has them."""
    patch.setattr(report, "_draw", lambda *arguments: {})


def log(client: object, plan: Plan) -> None:
    """What the task logs of a comparison, as far as it is read again."""
    folder = plan.comparison.place.path
    stages_id = client.create_experiment(
        stage_experiment(plan.experiment.name), (folder / "../../mlartifacts").resolve().as_uri()
    )
    client.create_experiment(plan.experiment.name)
    run = client.create_run(stages_id, tags={"stage": "compare"}).info.run_id
    for file in folder.iterdir():
        client.log_artifact(run, str(file), "stage" if file.name == MANIFEST else "comparison")
    client.set_terminated(run, "FINISHED")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("compare")
    settings = {"evaluation": {"decoding": {"max_new_tokens": 4}, "seeds": [1, 2]}, "cache": {"enabled": False}}
    first = finished(root / "a", "exp-a", methods={"kd": None, "sft": None}, **settings)
    second = finished(
        root / "b", "exp-b", "train.seeds=[20, 30]", "student.keep_layers=2", methods={"kd": None, "rkl": None}, **settings
    )
    longer = {"evaluation": {"decoding": {"max_new_tokens": 5}, "seeds": [1, 2]}, "cache": {"enabled": False}}
    third = finished(root / "a", "exp-c", methods={"kd": None}, **longer)
    shutil.copytree(third.comparison.place.path, root / "c" / "kept" / "exp-c" / "comparison")
    store = root / "store" / "mlflow.db"
    store.parent.mkdir()
    client = MlflowClient(f"sqlite:///{store}")
    for plan in (first, second):
        log(client, plan)
        kept = plan.run_dir.parent / "kept"
        shutil.copytree(plan.comparison.place.path, kept / plan.experiment.name / "comparison")
    for name in ("a", "b"):  # models, data and artifacts are gone, the stored files of the runs stay
        for entry in (root / name).iterdir():
            if entry.name not in ("kept", "runs"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(root / name / "runs" / "artifacts")
        shutil.rmtree(root / name / "runs" / f"exp-{name}")
    return Made(root / "a" / "kept", root / "b" / "kept", root / "c" / "kept", store)


@pytest.fixture(autouse=True)
def _without_figures(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)


def call(*arguments: object) -> None:
    """The command, in this process."""
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def scores(folder: Path) -> dict[tuple[str, ...], str]:
    with (folder / "results.csv").open(newline="") as stream:
        return {
            (row["method"], row["train_seed"], row["benchmark"], row["metric"]): row["mean"] for row in csv.DictReader(stream)
        }


@pytest.fixture(scope="module")
def merged(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("merged")
    call("compare", made.a, made.b / "exp-b", "--run-dir", run_dir)
    return run_dir / "compare-exp-a-exp-b" / "comparison"


def test_two_experiments_are_compared_from_their_comparisons_alone(merged: Path, made: Made) -> None:
    found, own = scores(merged), scores(made.a / "exp-a" / "comparison")
    assert {row for row, *_ in found} == {
        "teacher",
        "untrained (exp-a)",
        "untrained (exp-b)",
        "kd (exp-a)",
        "kd (exp-b)",
        "sft",
        "rkl",
    }
    assert {key: found[(key[0] if key[0] in ("teacher", "sft") else f"{key[0]} (exp-a)", *key[1:])] for key in own} == own
    text = (merged / "report.html").read_text(encoding="utf-8")
    assert "Every method against kd (exp-a)" in text and "student" in text and "http" not in text
    assert {"report.html", "results.csv", "results.parquet", "table.md", "table.tex", "figures"} <= set(os.listdir(merged))


def test_the_terminal_shows_table_headline_and_where_the_report_is(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    call("compare", made.a, made.b, "--out", tmp_path / "out", "--name", "both", "--baseline", "rkl")
    shown = capsys.readouterr().out
    assert "both: ROUGE-L" in shown and "kd (exp-b)" in shown and str(tmp_path / "out" / "report.html") in shown
    assert (tmp_path / "out" / "headline.txt").read_text().strip() in shown and "From the experiments exp-a, exp-b" in shown
    assert "rkl" in (tmp_path / "out" / "headline.txt").read_text()


def test_a_store_gives_the_same_comparison(made: Made, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made.store}")
    call("compare", "mlflow:exp-a", f"mlflow:exp-b@{made.store.parent}", "--run-dir", tmp_path)
    found = tmp_path / "compare-exp-a-exp-b" / "comparison"
    for name in ("results.csv", "headline.txt", "differences.csv"):
        assert (found / name).read_bytes() == (merged / name).read_bytes()
    call("compare", f"mlflow:exp-a@sqlite:///{made.store}", made.b, "--out", tmp_path / "mixed-sources")
    assert scores(tmp_path / "mixed-sources") == scores(merged)


def test_a_merged_comparison_is_compared_again_and_replaced_only_as_such(made: Made, merged: Path, tmp_path: Path) -> None:
    call("compare", merged, made.b, "--out", tmp_path / "out")
    assert scores(tmp_path / "out") == scores(merged)
    call("compare", made.a, made.b, "--out", tmp_path / "out", "--baseline", "sft")
    assert "sft" in (tmp_path / "out" / "headline.txt").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for taken in (tmp_path / "mine", made.a / "exp-a" / "comparison", made.a / "exp-a" / "comparison" / "report.html"):
        refused(ConfigError, "is there already and no merged comparison", made.a, made.b, "--out", taken)
    assert (tmp_path / "mine" / "thesis.tex").exists() and (made.a / "exp-a" / "comparison" / FILES[0]).exists()


def test_a_failure_leaves_what_was_there(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages import merge

    call("compare", made.a, made.b, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()
    monkeypatch.setattr(merge, "write_report", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("compare", made.a, made.b, "--out", tmp_path / "out", "--baseline", "sft")
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    (tmp_path / "out.partial" / "stray.svg").touch()
    monkeypatch.undo()
    call("compare", made.a, made.b, "--out", tmp_path / "out", "--baseline", "sft")
    assert (tmp_path / "out" / "report.html").read_bytes() != before
    assert not (tmp_path / "out" / "stray.svg").exists() and sorted(os.listdir(tmp_path)) == ["out"]


def refused(kind: type[PipelineError], message: str, *arguments: object) -> None:
    with pytest.raises(kind, match=message) as error:
        call("compare", *arguments)
    assert error.value.exit_code == 2


def older(folder: Path, comparison: Path, *names: str) -> Path:
    """The comparison without some of its files, as a version that did not write them would have left it."""
    from pipeline.artifacts import commit

    shutil.copytree(comparison, folder / "partial", ignore=shutil.ignore_patterns(MANIFEST, *names))
    commit(
        folder / "partial", folder / "comparison", stage="compare", fingerprint="0" * 16, recipe={}, upstream={}, counts={},
        seconds=0.0,
    )  # fmt: skip
    return folder / "comparison"


def test_wrong_folders_are_refused(made: Made, tmp_path: Path) -> None:
    refused(ConfigError, "absent is no folder", tmp_path / "absent", made.b)
    refused(ConfigError, f"did you mean {re.escape(str(made.a / 'exp-a'))}", "exp-a", made.b, "--run-dir", made.a)
    refused(ConfigError, "has no finished comparison; run `distilllens reproduce` first", tmp_path, made.b)
    both = tmp_path / "runs"
    for own in (made.a / "exp-a", made.b / "exp-b"):
        shutil.copytree(own, both / own.name)
    refused(ConfigError, "several experiments; give one of .*exp-a, .*exp-b", both, made.b)
    refused(ConfigError, "all arguments are the comparison", made.a, made.a / "exp-a")
    comparison = made.a / "exp-a" / "comparison"
    refused(ArtifactError, "older version.*run `distilllens reproduce` again", older(tmp_path, comparison, *FILES), made.b)
    damaged = tmp_path / "damaged"
    shutil.copytree(comparison, damaged)
    (damaged / GENERATIONS).write_bytes(b"")
    refused(ArtifactError, f"damaged: its records are damaged .the checksum of {GENERATIONS} differs", damaged, made.b)


def test_options_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    refused(ConfigError, "--set goes with CONFIG", made.a, made.b, "--set", "a=1")
    refused(ConfigError, "go with RUN..., not CONFIG", "experiment.yaml", "--out", tmp_path)
    refused(ConfigError, "--out: /proc/none cannot be written", made.a, made.b, "--out", "/proc/none")
    refused(ConfigError, "--name: '../x'; give letters", made.a, made.b, "--name", "../x", "--run-dir", tmp_path)
    refused(ConfigError, "'kd' is several rows", made.a, made.b, "--baseline", "kd", "--run-dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_stores_are_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made.store}")
    refused(ConfigError, "no finished comparison of that name; there are exp-a, exp-b", "mlflow:exp-c", made.b)
    for experiment in ("evil\x1b[2J", stage_experiment("evil\x1b[2J")):
        MlflowClient(f"sqlite:///{made.store}").create_experiment(experiment)
    refused(ConfigError, r"there are evil\?\[2J, exp-a, exp-b", "mlflow:exp-c", made.b)
    refused(ConfigError, "names no experiment; write mlflow:EXPERIMENT", "mlflow:", made.b)
    refused(ConfigError, "there is no store .*none.mlflow.db", f"mlflow:exp-a@{tmp_path / 'none'}", made.b)
    assert not (tmp_path / "none").exists()
    (tmp_path / "mlflow.db").write_text("no database", encoding="utf-8")
    refused(DataError, "the store cannot be read", f"mlflow:exp-a@{tmp_path}", made.b)


def test_a_store_without_records_or_with_too_large_ones_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from pipeline.reporting import sources

    shutil.copy(made.store, tmp_path / "mlflow.db")
    monkeypatch.setitem(sources.MAX_FILE_BYTES, GENERATIONS, 10)
    refused(ArtifactError, "generations.parquet has [0-9]+ bytes, at most 10 are read", f"mlflow:exp-a@{tmp_path}", made.b)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    stages_id = client.get_experiment_by_name(stage_experiment("exp-a")).experiment_id
    run = client.create_run(stages_id, tags={"stage": "compare"}).info.run_id  # a newer one, without files
    client.set_terminated(run, "FINISHED")
    refused(ArtifactError, "as of an older version; run `distilllens reproduce` again", f"mlflow:exp-a@{tmp_path}", made.b)


def test_an_unreachable_server_ends_with_one_message(made: Made, tmp_path: Path) -> None:
    source = "mlflow:exp-a@http://user:secret@127.0.0.1:9"
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "compare", source, str(made.b), "--out", str(tmp_path / "out")],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**own, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr and "secret" not in result.stderr
    assert "the store cannot be read" in result.stderr and not (tmp_path / "out").exists()


def test_protocols_are_mixed_only_if_told_to(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = (made.a, made.c, "--run-dir", tmp_path / "out")
    refused(ArtifactError, "(?s)--mix-protocols.*general: [0-9a-f]{16} .exp-a. and [0-9a-f]{16} .exp-c., which differ", *mixed)
    refused(ArtifactError, "decoding.max_new_tokens: 4 / 5", *mixed)
    assert not (tmp_path / "out").exists()
    call("compare", *mixed, "--mix-protocols")
    folder = tmp_path / "out" / "compare-exp-a-exp-c" / "comparison"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Protocols are mixed" in capsys.readouterr().out and '<p role="note"><strong>Protocols are mixed' in text
    assert "kd (exp-c) (another protocol on general)" in text and "Protocols are mixed" in (folder / "table.md").read_text()
