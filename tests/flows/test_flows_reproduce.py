"""The whole flow on tiny random models: artifacts, MLflow runs, Prefect runs, reuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import experiment
import pytest

from pipeline.config import load_experiment
from pipeline.errors import DataError
from pipeline.plan import plan_experiment

METHODS = ["sft", "kd", "mse", "distilllens"]


def run(config: Path, run_dir: Path, *overrides: str, until: str = "compare") -> None:
    from flows.reproduce import reproduce

    reproduce(config=str(config), overrides=list(overrides), run_dir=str(run_dir), until=until)


def manifests(run_dir: Path) -> dict[str, float]:
    """stage/fingerprint → creation time."""
    files = (run_dir / "artifacts").glob("*/*/manifest.json")
    return {f"{f.parent.parent.name}/{f.parent.name}": json.loads(f.read_text())["created"] for f in files}


@pytest.fixture(scope="module")
def finished(prefect_server: None, migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(experiment file, run directory) of a finished experiment."""
    import shutil

    folder = tmp_path_factory.mktemp("experiment")
    run_dir = folder / "runs"
    run_dir.mkdir()
    shutil.copy(migrated_store, run_dir / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        config = experiment.write(folder)
        run(config, run_dir)
    return config, run_dir


def mlflow_runs(run_dir: Path, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.resolve() / 'mlflow.db'}")
    found = client.get_experiment_by_name(name)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def test_results_have_every_method_seed_and_benchmark(finished: tuple[Path, Path]) -> None:
    rows = list(csv.DictReader((finished[1] / "tiny" / "comparison" / "results.csv").open()))
    trained = {(method, seed) for method in METHODS for seed in ("10", "20")}
    expected = {*trained, ("teacher", ""), ("untrained", "")}
    assert {(row["method"], row["train_seed"]) for row in rows} == expected
    assert {row["benchmark"] for row in rows} == {"general", "tasks", "avg"}
    assert len(rows) == len(expected) * 3 * 2
    assert {row["n_decoding_seeds"] for row in rows} == {"2"}
    assert (finished[1] / "tiny" / "comparison" / "report.html").read_text().count("distilllens") >= 1


def test_one_flat_run_per_trial_with_the_same_metric_names(finished: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    runs = {run.info.run_name: run for run in mlflow_runs(finished[1], "tiny")}
    assert set(runs) == {"teacher", "untrained", *(f"{m} s{s}" for m in METHODS for s in (10, 20))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert not any("mlflow.parentRunId" in run.data.tags for run in runs.values())
    final = {f"eval/{b}/{m}" for b in ("general", "tasks", "avg") for m in ("rouge_l", "exact_match")}
    for run in runs.values():
        assert final <= set(run.data.metrics)
    common = {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens_per_second",
        "dev/loss",
        "dev/rouge_l",
        "cost/train_seconds",
    }
    for method in METHODS:
        assert common <= set(runs[f"{method} s10"].data.metrics)
    assert {"train/loss_task", "train/loss_lens"} <= set(runs["distilllens s10"].data.metrics)
    assert {"train/loss_task", "train/loss_features"} <= set(runs["mse s10"].data.metrics)
    trial = runs["distilllens s10"]
    assert trial.data.params["method.lens.weight"] == "1.0" and trial.data.params["train_seed"] == "10"
    assert trial.data.params["student"] == "pruned to 3 of 6 layers"
    assert trial.data.tags["checkpoint"].endswith("/model") and "git_commit" in trial.data.tags
    inputs = {item.dataset.name: item for item in trial.inputs.dataset_inputs}
    config = MlflowClient(f"sqlite:///{finished[1].resolve() / 'mlflow.db'}").list_artifacts(trial.info.run_id, "config")
    assert [file.path for file in config] == ["config/config.yaml"]
    assert set(inputs) == {"train", "general", "tasks"} and all(item.dataset.digest for item in inputs.values())


def test_every_trained_student_is_a_model_of_its_run(finished: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished[1].resolve() / 'mlflow.db'}")
    models = client.search_logged_models([client.get_experiment_by_name("tiny").experiment_id])
    runs = {run.info.run_id: run.info.run_name for run in mlflow_runs(finished[1], "tiny")}
    assert sorted(runs[model.source_run_id] for model in models) == sorted(f"{m} s{s}" for m in METHODS for s in (10, 20))
    assert {str(model.status) for model in models} == {"READY"}


def test_curves_are_complete_and_in_order(finished: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished[1].resolve() / 'mlflow.db'}")
    run = next(run for run in mlflow_runs(finished[1], "tiny") if run.info.run_name == "kd s10")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert {f.path for f in client.list_artifacts(run.info.run_id, "generations")} == {
        "generations/general.json",
        "generations/tasks.json",
    }


def test_stage_runs_are_kept_apart_and_linked(finished: tuple[Path, Path]) -> None:
    stages = {run.info.run_id: run for run in mlflow_runs(finished[1], "tiny · stages")}
    assert {run.data.tags["stage"] for run in stages.values()} == {"prepare", "student", "cache", "compare"}
    trial = next(run for run in mlflow_runs(finished[1], "tiny") if run.info.run_name == "kd s10")
    cache = stages[trial.data.tags["stage_run.cache"]]
    assert cache.data.tags["stage"] == "cache" and cache.data.tags["trial.kd s10"] == trial.info.run_id
    prepared = stages[trial.data.tags["stage_run.prepare"]]
    assert {item.dataset.name for item in prepared.inputs.dataset_inputs} == {"train", "dev"}


def test_the_prefect_server_knows_every_task(finished: tuple[Path, Path]) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_task_runs(limit=200)}
        artifacts = client.read_artifacts()
    assert {
        "prepare training rows",
        "initialise student",
        "cache teacher states",
        "train kd s10",
        "evaluate teacher",
        "compare",
    } <= names
    assert any(artifact.key.startswith("comparison-") for artifact in artifacts if artifact.key)


def test_a_second_run_makes_nothing_again(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, run_dir = finished
    before, count = manifests(run_dir), len(mlflow_runs(run_dir, "tiny"))
    run(config, run_dir)
    assert manifests(run_dir) == before and len(mlflow_runs(run_dir, "tiny")) == count


def test_the_plan_of_a_finished_run_is_finished(finished: tuple[Path, Path]) -> None:
    config, run_dir = finished
    plan = plan_experiment(load_experiment(config), run_dir)
    assert plan.finished() and all(place.existing() is not None for place in plan.places())


def todo(config: Path, run_dir: Path, *overrides: str) -> set[str]:
    plan = plan_experiment(load_experiment(config, overrides), run_dir)
    return {place.label for place in plan.places() if place.stage != "compare" and place.existing() is None}


def test_another_lambda_touches_one_method_only(finished: tuple[Path, Path]) -> None:
    missing = todo(*finished, "methods.distilllens.lens.weight=2")
    assert {label.split()[1] for label in missing} == {"distilllens"}
    assert len([label for label in missing if label.startswith("train")]) == 2


def test_fewer_layers_are_served_by_the_same_cache(finished: tuple[Path, Path]) -> None:
    missing = todo(*finished, "methods.distilllens.lens.pairs.count=1", "methods.mse.features.pairs.count=1")
    assert "cache teacher states" not in missing and "train kd s10" not in missing


def test_another_template_redoes_everything_that_reads_text(finished: tuple[Path, Path]) -> None:
    config, run_dir = finished
    plan = plan_experiment(load_experiment(config, ["data.max_tokens=500"]), run_dir)
    stages = {place.stage for place in plan.places() if place.stage != "compare" and place.existing() is None}
    assert {"prepare", "student", "cache", "train", "evaluate"} <= stages


def test_another_tokenizer_redoes_everything(finished: tuple[Path, Path], tmp_path: Path) -> None:
    import tiny

    config, run_dir = finished
    other = tiny.save(tiny.llama(layers=6), tmp_path / "other")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    plan = plan_experiment(load_experiment(config, ["tokenizer.kind=local", f"tokenizer.path={other}"]), run_dir)
    assert all(place.existing() is None for place in plan.places() if place.stage != "compare") and not plan.finished()


def test_a_malformed_row_fails_with_its_line_and_leaves_no_artifact(
    prefect_server: None, tmp_path: Path, run_dir: Path
) -> None:
    config = experiment.write(tmp_path / "e")
    path = tmp_path / "e" / "train.jsonl"
    path.write_text(path.read_text() + "{not json\n")
    with pytest.raises(DataError, match="train.jsonl:25"):
        run(config, run_dir)
    assert not list((run_dir / "artifacts").glob("*/*/manifest.json"))


def test_a_stage_can_be_the_last(prefect_server: None, tmp_path: Path, run_dir: Path) -> None:
    run(experiment.write(tmp_path / "e"), run_dir, until="cache")
    assert {key.split("/")[0] for key in manifests(run_dir)} == {"prepare", "student", "cache"}


def test_nothing_is_told_to_anyone_when_the_store_is_unreachable(
    prefect_server: None, tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = experiment.write(tmp_path / "e", methods={"kd": None}, train={"max_steps": 2, "batch_size": 6})
    run(config, run_dir)
    assert (run_dir / "tiny" / "comparison" / "results.csv").is_file()
    assert not (run_dir / "tiny" / "tracked.json").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    before = manifests(run_dir)
    run(config, run_dir)  # to another store, and nothing is made again
    found = {found.info.run_name: found for found in mlflow_runs(run_dir, "tiny")}
    assert set(found) == {"teacher", "untrained", "kd s10"} and {each.info.status for each in found.values()} == {"FINISHED"}
    assert found["kd s10"].data.tags["mlflow.loggedImages"] == "True"
    assert manifests(run_dir) == before and (run_dir / "tiny" / "tracked.json").exists()


def test_a_tuned_teacher_and_its_generations_are_stages_of_their_own(
    prefect_server: None, tmp_path: Path, run_dir: Path
) -> None:
    config = experiment.write(
        tmp_path / "e",
        teacher_finetune={"train": {"max_steps": 2, "batch_size": 6}, "validation": {"select": "loss"}},
        methods={"kd": None, "seqkd": {"generation": {"decoding": {"max_new_tokens": 6}}}},
        train={"max_steps": 2, "batch_size": 6, "learning_rate": [1e-4, 1e-3]},
        evaluation={"decoding": {"max_new_tokens": 4}, "seeds": [1], "lens_profile": True},
    )
    run(config, run_dir)
    stages = {run.info.run_id: run for run in mlflow_runs(run_dir, "tiny · stages")}
    assert {run.data.tags["stage"] for run in stages.values()} == {
        "prepare", "teacher", "student", "cache", "seqkd", "compare",
    }  # fmt: skip
    trial = next(run for run in mlflow_runs(run_dir, "tiny") if run.info.run_name == "seqkd s10")
    linked = {stages[value].data.tags["stage"] for key, value in trial.data.tags.items() if key.startswith("stage_run.")}
    assert linked == {"prepare", "teacher", "student", "cache", "seqkd"}
    assert trial.data.tags["learning_rate"] in ("0.0001", "0.001")
    assert {"search/0.0001", "search/0.001"} <= trial.data.metrics.keys()
    tuning = next(run for run in stages.values() if run.data.tags["stage"] == "teacher")
    assert {"train/loss", "dev/loss"} <= tuning.data.metrics.keys()
    plan = plan_experiment(load_experiment(config), run_dir)
    assert plan.finished() and all(place.existing() is not None for place in plan.places())
    rows = {row["setting"]: row for row in csv.DictReader((run_dir / "tiny" / "comparison" / "differences.csv").open())}
    profile = json.loads((run_dir / "tiny" / "comparison" / "lens_profile.json").read_text())
    assert profile.keys() == {"untrained", "kd s10", "seqkd s10"}
    last = next(layer for layer in profile["kd s10"] if layer["final"])
    assert trial.data.metrics.keys() >= {f"lens/layer_{layer['student_layer']:02d}/jsd" for layer in profile["kd s10"]}
    assert (last["student_layer"], last["teacher_layer"]) == (3, 6)
    report = (run_dir / "tiny" / "comparison" / "report.html").read_text()
    assert report.count("data:image/svg+xml;base64,") == 7
    assert rows["training responses"] == {"setting": "training responses", "kd": "references", "seqkd": "teacher's"}
