"""Sweeps with a process for each trial: reuse, failures, time limits, interruption, engines, search."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import experiment
import pytest
import yaml

from pipeline.artifacts import peek
from pipeline.sweeps.outcome import SweepFailed

ROOT = Path(__file__).resolve().parents[2]
LAMBDA = "methods.distilllens.lens.weight"
AXES = {
    "method": ["kd", "distilllens"],
    "train_seed": [10, 20],
    LAMBDA: {"values": [0.5, 2.0], "when": {"method": "distilllens"}},
}
ONE = {"method": ["kd"], "train_seed": [10]}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


def write(folder: Path, axes: dict[str, Any], changes: dict[str, Any] | None = None, **settings: Any) -> Path:
    experiment.write(folder, **(changes or {}))
    content = {"name": "swept", "experiment": "experiment.yaml", "axes": axes, "concurrency": 2, "trial": {"threads": 1}}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**content, **settings}, sort_keys=False), encoding="utf-8")
    return path


def run(config: Path, run_dir: Path, *overrides: str) -> None:
    from flows.sweep import sweep

    sweep(config=str(config), overrides=list(overrides), run_dir=str(run_dir))


def results(run_dir: Path) -> dict[tuple[str, ...], str]:
    with (run_dir / "swept" / "comparison" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {(row["method"], row["train_seed"], row["benchmark"], row["metric"]): row["mean"] for row in rows}


def made(run_dir: Path, stage: str) -> dict[str, float]:
    """Fingerprint → creation time of a stage's artifacts."""
    found = {folder.name: peek(folder) for folder in (run_dir / "artifacts" / stage).glob("*/")}
    return {name: manifest.created for name, manifest in found.items() if manifest is not None}


def tracked(run_dir: Path, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.resolve() / 'mlflow.db'}")
    found = client.get_experiment_by_name(name)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def logs(run_dir: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in (run_dir / "swept" / "trials").glob("*/log.txt")}


@pytest.fixture(scope="module")
def finished(prefect_server: None, migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sweep file, run directory) of a finished sweep."""
    import shutil

    folder = tmp_path_factory.mktemp("sweep")
    run_dir = folder / "runs"
    run_dir.mkdir()
    shutil.copy(migrated_store, run_dir / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        config = write(folder, AXES)
        run(config, run_dir)
    return config, run_dir


ROWS = ("kd", "distilllens weight=0.5", "distilllens weight=2")


def test_every_trial_is_a_row_of_the_comparison(finished: tuple[Path, Path]) -> None:
    found = {(key[0], key[1]) for key in results(finished[1])}
    assert found == {("teacher", ""), ("untrained", ""), *((row, seed) for row in ROWS for seed in ("10", "20"))}


def test_trials_are_flat_runs_and_stages_are_kept_apart(finished: tuple[Path, Path]) -> None:
    runs = {run.info.run_name: run for run in tracked(finished[1], "swept")}
    assert set(runs) == {"teacher", "untrained", *(f"{row} s{seed}" for row in ROWS for seed in (10, 20))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    trial = runs["distilllens weight=2 s10"]
    assert trial.data.tags["method"] == "distilllens" and trial.data.params["method.lens.weight"] == "2.0"
    assert "eval/avg/rouge_l" in trial.data.metrics and "train/loss" in trial.data.metrics
    stages = {run.info.run_id: run for run in tracked(finished[1], "swept · stages")}
    cache = stages[trial.data.tags["stage_run.cache"]]
    assert cache.data.tags["trial.distilllens weight:2 s10"] == trial.info.run_id
    assert len(made(finished[1], "cache")) == 1


def test_each_trial_had_a_process_and_a_log_of_its_own(finished: tuple[Path, Path]) -> None:
    found = logs(finished[1])
    assert len(found) == 8
    assert all("reused" in text for text in found.values())  # its inputs were made before it started
    assert not any("MLflow: could not" in text for text in found.values())


def test_trials_are_those_of_single_runs(finished: tuple[Path, Path]) -> None:
    from pipeline.config import load_experiment
    from pipeline.plan import plan_experiment

    config, run_dir = finished
    plan = plan_experiment(load_experiment(config.parent / "experiment.yaml", [f"{LAMBDA}=0.5"]), run_dir)
    assert {trial.name for trial in plan.trials if trial.finished()} == {
        "teacher", "untrained", *(f"{method} s{seed}" for method in ("kd", "distilllens") for seed in (10, 20)),
    }  # fmt: skip


def test_again_nothing_is_done(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, run_dir = finished
    before, count, log = made(run_dir, "train"), len(tracked(run_dir, "swept")), logs(run_dir)
    run(config, run_dir)
    assert (made(run_dir, "train"), len(tracked(run_dir, "swept")), logs(run_dir)) == (before, count, log)


def test_a_wider_sweep_runs_only_what_is_new(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, run_dir = finished
    before, evaluated = made(run_dir, "train"), made(run_dir, "evaluate")
    wider = {**AXES, LAMBDA: {"values": [0.5, 1.0, 2.0], "when": {"method": "distilllens"}}, "train_seed": [10]}
    run(write(config.parent, wider), run_dir)
    after = made(run_dir, "train")
    assert before.items() <= after.items() and len(after) == len(before) + 1
    assert len(made(run_dir, "evaluate")) == len(evaluated) + 2
    assert {key[0] for key in results(run_dir)} == {"teacher", "untrained", *ROWS, "distilllens weight=1"}


def test_a_trial_that_fails_touches_no_other(prefect_server: None, tmp_path: Path, run_dir: Path) -> None:
    # A learning rate at which training breaks down, beside one at which it does not.
    config = write(tmp_path / "e", {**ONE, "train.learning_rate": [1e30, 1e-3]}, trial={"threads": 1, "retries": 0})
    with pytest.raises(SweepFailed, match=r"3 trials finished \(3 of them now\), 1 failed:\n  - kd learning_rate=1e\+30 s10"):
        run(config, run_dir)
    assert {key[0] for key in results(run_dir)} == {"teacher", "untrained", "kd learning_rate=0.001"}
    statuses = {run.info.run_name: run.info.status for run in tracked(run_dir, "swept")}
    assert statuses["kd learning_rate=1e+30 s10"] == "FAILED" and statuses["kd learning_rate=0.001 s10"] == "FINISHED"
    done = made(run_dir, "train")
    with pytest.raises(SweepFailed, match="3 trials finished \\(0 of them now\\), 1 failed"):
        run(config, run_dir)
    assert made(run_dir, "train") == done


def test_a_killed_trial_is_tried_again_from_its_checkpoint(
    prefect_server: None, tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process kills itself after the first checkpoint, once.
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"mark = {str(tmp_path / 'killed')!r}\n"
        "if 'pipeline.worker' in ' '.join(sys.orig_argv) and not os.path.exists(mark):\n"
        "    from pipeline.training import checkpoint\n"
        "    save = checkpoint.save\n"
        "    def once(*arguments, **named):\n"
        "        save(*arguments, **named)\n"
        "        if not os.path.exists(mark):\n"
        "            open(mark, 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    checkpoint.save = once\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), str(ROOT), str(ROOT / "tests")]))
    run(write(tmp_path / "e", ONE), run_dir)
    assert (tmp_path / "killed").exists()
    (log,) = [text for name, text in logs(run_dir).items() if name.startswith("kd")]
    assert "going on from step 2 of 4" in log
    assert {key[0] for key in results(run_dir)} == {"teacher", "untrained", "kd"}


def test_a_trial_over_its_time_is_stopped_and_told(prefect_server: None, tmp_path: Path, run_dir: Path) -> None:
    config = write(tmp_path / "e", ONE, trial={"threads": 1, "time_limit_minutes": 0.005})
    with pytest.raises(SweepFailed, match=r"kd s10: over its time limit of 0\.005 minutes; its checkpoint is kept"):
        run(config, run_dir)


def test_a_budget_leaves_the_rest_for_the_next_call(prefect_server: None, tmp_path: Path, run_dir: Path) -> None:
    config = write(tmp_path / "e", {"method": ["kd"], "train_seed": [10, 20]}, budget={"trials": 3})
    run(config, run_dir)
    assert len(made(run_dir, "train")) == 1 and not (run_dir / "swept" / "tracked.json").exists()
    run(config, run_dir)
    assert len(made(run_dir, "train")) == 2 and (run_dir / "swept" / "tracked.json").exists()


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_other_engines_give_the_same_numbers(engine: str, finished: tuple[Path, Path], tmp_path: Path, run_dir: Path) -> None:
    pytest.importorskip(f"prefect_{engine}", reason=f"prefect-{engine} is not installed")
    run(write(tmp_path / "e", {**AXES, "train_seed": [10]}, engine=engine), run_dir)
    local = results(finished[1])
    found = results(run_dir)
    assert found and all(local[key] == value for key, value in found.items() if key[2] != "avg" or key in local)
    assert {key[0] for key in found} == {"teacher", "untrained", *ROWS}


def test_optuna_searches_on_the_validation_value(prefect_server: None, tmp_path: Path, run_dir: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    axes = {**ONE, "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}
    search = {"kind": "optuna", "points": 3, "batch": 1, "seed": 1}
    config = write(tmp_path / "e", axes, {"validation": {"select": "loss"}}, search=search)
    run(config, run_dir)
    done = made(run_dir, "train")
    assert len(done) == 3
    run(config, run_dir)  # the same results, so the same suggestions
    assert made(run_dir, "train") == done
    run(write(tmp_path / "e", axes, {"validation": {"select": "loss"}}, search={**search, "points": 4}), run_dir)
    assert made(run_dir, "train").items() > done.items() and len(made(run_dir, "train")) == 4


def processes_of(run_dir: Path) -> dict[int, str]:
    """Living processes, other than this one, whose command line or environment names the run directory."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (entry / "environ").read_bytes().decode(errors="replace")
            dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        # The server's command line does not name the run directory, its environment does.
        if str(run_dir) in command + environment and not dead and int(entry.name) != os.getpid():
            found[int(entry.name)] = command
    return found


def until(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_leaves_checkpoints_and_no_process(number: signal.Signals, tmp_path: Path, run_dir: Path) -> None:
    slow = {"train": {"max_steps": 20000, "batch_size": 6, "learning_rate": 1e-4, "checkpoint_every": 5}}
    config = write(tmp_path / "e", {"method": ["kd"], "train_seed": [10, 20]}, slow)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "pipeline.cli", "sweep", str(config), "--run-dir", str(run_dir)]
    log = (tmp_path / "log.txt").open("w")
    sweep = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        partial = run_dir / "artifacts" / "train"
        assert until(lambda: len(list(partial.glob("*.partial/checkpoint/state.json"))) == 2, 180), (
            tmp_path / "log.txt"
        ).read_text()
        workers = [pid for pid, text in processes_of(run_dir).items() if "pipeline.worker" in text]
        assert len(workers) == 2
        os.kill(sweep.pid, number)
        assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 8), processes_of(run_dir)
        sweep.wait(60)
        assert sweep.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        assert until(lambda: not processes_of(run_dir), 20), processes_of(run_dir)
    finally:
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
    assert len(list(partial.glob("*.partial/checkpoint/state.json"))) == 2
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    if number != signal.SIGKILL:
        statuses = {run.info.run_name: run.info.status for run in tracked(run_dir, "swept")}
        assert statuses["kd s10"] == statuses["kd s20"] == "KILLED"


def test_scores_below_the_accepted_ones_fail_the_sweep_until_they_are_accepted(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as parquet
    from prefect.client.orchestration import get_client

    from flows.sweep import sweep
    from pipeline.sweeps.accepted import SweepRegressed

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, run_dir = write(finished[0].parent, AXES), finished[1]
    run(config, run_dir)
    path = run_dir / "swept" / "accepted.json"
    accepted = json.loads(path.read_text())
    for benchmark, seeds in accepted["kd"].items():
        for seed, folder in seeds.items():
            better = run_dir / f"better-{benchmark}-{seed}"
            shutil.copytree(run_dir / folder, better)
            rows = parquet.read_table(better / "generations.parquet")
            values = pa.array([90.0 + index % 3 for index in range(len(rows))])
            column = rows.schema.get_field_index("rouge_l")
            parquet.write_table(rows.set_column(column, "rouge_l", values), better / "generations.parquet")
            accepted["kd"][benchmark][seed] = better.name
    path.write_text(json.dumps(accepted))
    for _ in range(2):  # looking does not accept
        with pytest.raises(SweepRegressed, match=r"1 rows score below .*\n  - kd: -\d\d\.\d\d ROUGE-L"):
            run(config, run_dir)
    with get_client(sync_client=True) as client:
        pages = [artifact.data for artifact in client.read_artifacts() if str(artifact.key).startswith("accepted-")]
    assert any("| kd | -" in str(page) and "**regression**" in str(page) for page in pages)
    sweep(config=str(config), overrides=[], run_dir=str(run_dir), accept=True)
    run(config, run_dir)
