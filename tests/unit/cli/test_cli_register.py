"""Registering the best student: which one it is, what is said of it, and that its name loads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiment
import pytest
import tiny
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import commit
from pipeline.config import load_experiment
from pipeline.errors import ConfigError
from pipeline.mlflow_model import deliver_model
from pipeline.plan import Plan, plan_experiment
from pipeline.registering import BEST, TRAINING, VALIDATION, experiment_name, register_best
from pipeline.tracking import NoTracker
from pipeline.trial import finish_trial, trial_facts, trial_key


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    run_dir: Path
    experiment: str

    def model(self, fingerprint: str) -> Path:
        return self.run_dir / "artifacts" / "train" / fingerprint / "model"

    def student(
        self, name: str, metrics: dict[str, Any], status: str = "FINISHED", validation: str = "v", seed: int = 0
    ) -> str:
        """A finished trial whose training is in the run directory; a list of values is one at each step."""
        fingerprint, method = f"{seed:016x}", name.partition(" ")[0]
        folder = self.model(fingerprint).parent
        if not folder.exists():
            partial = folder.with_name(f"{fingerprint}.partial")
            tiny.save(tiny.llama(seed=seed), partial / "model")
            recipe = {"method": {"kind": method}, "seed": 10}
            upstream = {"prepare": "0" * 16, "student": "0" * 16}
            commit(
                partial, folder, stage="train", fingerprint=fingerprint, recipe=recipe, upstream=upstream, counts={}, seconds=0
            )
        tags = {"stage": "trial", "method": method, TRAINING: fingerprint, VALIDATION: validation}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        for key, values in metrics.items():
            for step, value in enumerate(values if isinstance(values, list) else [values]):
                self.client.log_metric(run, key, value, step=step)
        self.client.log_metric(run, "train/best_step", 1)
        self.client.set_terminated(run, status)
        return str(run)

    def register(self, name: str = "students", by: str | None = None) -> Any:
        return register_best(self.client, self.run_dir, "tiny", name, by)

    def best(self, name: str = "students") -> Any:
        return self.client.get_model_version_by_alias(name, BEST)

    def versions(self, name: str = "students") -> int:
        return len(self.client.search_model_versions(f"name = '{name}'"))


@pytest.fixture
def store(tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    run_dir = tmp_path / "runs"
    run_dir.mkdir()
    shutil.copy(migrated_store, run_dir / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir / 'mlflow.db'}")
    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    return Store(client, run_dir, client.create_experiment("tiny", (run_dir / "mlartifacts" / "tiny").as_uri()))


def refused(store: Store, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        store.register(*arguments)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_the_alias_is_on_the_student_with_the_best_dev_score_of_the_weights_that_were_kept(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 5, 99], "dev/loss": [9, 1, 1], "eval/avg/rouge_l": 80}, seed=1)
    winner = store.student("kd s20", {"dev/rouge_l": [0, 6, 2], "dev/loss": [9, 3, 3], "eval/avg/rouge_l": 20}, seed=2)
    store.student("sft s10", {"dev/rouge_l": [0, 98, 98]}, status="RUNNING", seed=3)
    store.student("sft s20", {"dev/rouge_l": [0, float("nan"), 1]}, seed=4)
    done = store.register()
    assert (done.version, done.added, done.run, done.metric, done.value, done.compared) == (
        "1", True, "kd s20", "dev/rouge_l", 6, 2
    )  # fmt: skip
    version = store.best()
    assert (version.version, version.run_id) in {("1", winner), (1, winner)}
    wanted = {"experiment": "tiny", "run": "kd s20", "method": "kd", "metric": "dev/rouge_l", "value": "6"}
    assert version.tags == wanted
    assert str(done) == "students version 1: kd s20, dev/rouge_l 6, the highest of 2 finished students"


def test_a_loss_is_best_where_it_is_lowest(store: Store) -> None:
    store.student("kd s10", {"dev/loss": [9, 1.5, 1]}, seed=1)
    store.student("kd s20", {"dev/loss": [9, 2, 0]}, seed=2)
    assert (store.register().run, str(store.register()).count("lowest")) == ("kd s10", 1)


def test_test_scores_choose_only_where_they_are_named_and_that_is_said(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 5], "eval/avg/rouge_l": 80}, seed=1)
    store.student("kd s20", {"dev/rouge_l": [0, 6], "eval/avg/rouge_l": 20}, seed=2)
    assert store.register().run == "kd s20" and "test scores" not in str(store.register())
    chosen = store.register(by="eval/avg/rouge_l")
    assert chosen.run == "kd s10" and "Chosen on test scores" in str(chosen)


def test_the_same_best_adds_no_version_and_another_moves_the_alias(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 5]}, seed=1)
    assert store.register().added
    again = store.register()
    assert (again.added, again.version, store.versions()) == (False, "1", 1) and "already" in str(again)
    store.student("kd s20", {"dev/rouge_l": [0, 6]}, seed=2)
    assert (store.register().version, store.versions(), str(store.best().version)) == ("2", 2, "2")
    back = store.register(by="dev/rouge_l")
    assert (back.version, store.versions()) == ("2", 2)
    assert store.register("others").version == "1"
    (told,) = {model.tags["mlflow.modelVersions"] for model in store.client.search_logged_models([store.experiment]) if
               model.name == "kd s20"}  # fmt: skip
    assert told == '[{"name": "students", "version": "2"}, {"name": "others", "version": "1"}]'


def test_its_name_loads_it(store: Store) -> None:
    import mlflow.transformers

    store.student("kd s10", {"dev/rouge_l": [0, 5]}, seed=1)
    store.student("kd s20", {"dev/rouge_l": [0, 6]}, seed=2)
    store.register()
    tokenizer = AutoTokenizer.from_pretrained(store.model(f"{2:016x}"))
    ids = tokenizer("the cat sat on", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(store.model(f"{2:016x}"))
    with torch.no_grad():
        wanted = model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
    pipeline = mlflow.transformers.load_model(f"models:/students@{BEST}")
    assert pipeline("the cat sat on", max_new_tokens=8, return_tensors=True)[0]["generated_token_ids"] == wanted


def test_scores_on_other_dev_rows_are_left_out(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 50]}, validation="few rows", seed=1)
    store.student("kd s20", {"dev/rouge_l": [0, 6]}, seed=2)
    done = store.register()
    assert (done.run, done.compared, done.left_out) == ("kd s20", 1, 1)
    assert str(done).endswith("the highest of 1 finished student; 1 with other validation settings left out")


def test_a_logged_model_needs_no_training_on_this_machine(store: Store) -> None:
    run = store.student("kd s10", {"dev/rouge_l": [0, 5]}, seed=1)
    model_id = deliver_model(store.client, run, store.model(f"{1:016x}"), "kd s10")
    shutil.rmtree(store.run_dir / "artifacts")
    assert store.register().version == "1" and store.best().source == f"models:/{model_id}"


def test_a_model_that_is_neither_logged_nor_there_is_told(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 5]}, seed=1)
    shutil.rmtree(store.run_dir / "artifacts")
    problem = refused(store)
    assert "kd s10 is the best, but its model is not logged" in problem and "--run-dir" in problem
    with pytest.raises(MlflowException):
        store.best()


def test_a_damaged_training_is_told(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 5]}, seed=1)
    (store.model(f"{1:016x}") / "model.safetensors").unlink()
    assert "its model is not logged, and cannot be: " in refused(store)


def test_what_is_not_there_is_told_with_what_is(store: Store) -> None:
    with pytest.raises(ConfigError, match="'tinny' is no experiment of this store; did you mean tiny"):
        register_best(store.client, store.run_dir, "tinny", "students")
    assert "tiny has no finished student yet" in refused(store)
    scores = {"dev/rouge_l": [0, 5], "eval/avg/rouge_l": 8, "eval/avg/rouge_l_decoding_std": 1, "train/loss": 2}
    store.student("kd s10", scores, seed=1)
    assert "did you mean dev/rouge_l? (there are dev/rouge_l, eval/avg/rouge_l)" in refused(store, "students", "dev/rouge")
    assert "has a metric 'train/loss'" in refused(store, "students", "train/loss")
    for name in ("", "a/b", "a:b", "a@b", "..", "a'b"):
        assert "--as" in refused(store, name)
    assert store.client.search_registered_models() == []


def test_a_store_that_does_not_answer_is_one_message(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MlflowException("API request to endpoint /api failed with error code 503")

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", fail)
    assert "503" in refused(store) and "MLFLOW_TRACKING_URI" in refused(store)


def test_an_experiment_may_be_given_as_its_file(tmp_path: Path) -> None:
    assert experiment_name(str(experiment.write(tmp_path))) == "tiny"
    assert experiment_name("tiny") == "tiny"


class Told(NoTracker):
    """Remembers models and labels."""

    def __init__(self) -> None:
        self.models: list[tuple[str, Path, str]] = []

    def log_model(self, run: str, folder: Path, name: str) -> None:
        self.models.append((run, folder, name))


def planned(folder: Path, *overrides: str) -> Plan:
    return plan_experiment(load_experiment(experiment.write(folder), overrides), folder / "runs")


def test_every_trained_student_of_an_experiment_is_logged_unless_that_is_switched_off(tmp_path: Path) -> None:
    plan, told = planned(tmp_path, "train.seeds=[10]"), Told()
    for trial in plan.trials:
        finish_trial(trial, plan.config_path, "run", told, {}, plan.experiment.tracking.log_models)
    assert sorted(name for _, _, name in told.models) == ["distilllens s10", "kd s10", "mse s10", "sft s10"]
    trained = [trial.train.place.path / "model" for trial in plan.trials if trial.train is not None]
    assert [folder for _, folder, _ in told.models] == trained
    off = Told()
    for trial in plan.trials:
        finish_trial(trial, plan.config_path, "run", off, {}, False)
    assert off.models == []


def test_logging_models_or_not_changes_no_fingerprint(tmp_path: Path) -> None:
    from pipeline.stages import prepare

    on, off = planned(tmp_path, "train.seeds=[10]"), planned(tmp_path, "train.seeds=[10]", "tracking.log_models=false")
    assert on.experiment.tracking.log_models and not off.experiment.tracking.log_models
    assert on.comparison.place == off.comparison.place
    places = [[place.fingerprint for trial in plan.trials for place in trial.places] for plan in (on, off)]
    keys = [[trial_key(trial) for trial in plan.trials] for plan in (on, off)]
    assert places[0] == places[1] and keys[0] == keys[1]
    prepare.run(on.data)
    for benchmark in on.benchmarks:
        prepare.run_benchmark(benchmark)
    tags = [trial_facts(plan, plan.trials[0], {}).tags["config_fingerprint"] for plan in (on, off)]
    assert tags[0] == tags[1]


def test_the_command_registers_and_says_how_to_load(store: Store) -> None:
    store.student("kd s10", {"dev/rouge_l": [0, 5]}, seed=1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    root = str(Path(__file__).resolve().parents[3])

    def register(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.cli", "register", *arguments]
        return subprocess.run(
            command,
            cwd=store.run_dir.parent,
            capture_output=True,
            text=True,
            timeout=240,
            env={**environment, "PYTHONPATH": root},
        )

    done = register("tiny", "--as", "students")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "students version 1: kd s10, dev/rouge_l 5, the highest of 1 finished student",
        'load it: mlflow.transformers.load_model("models:/students@best") with '
        f"MLFLOW_TRACKING_URI=sqlite:///{store.run_dir / 'mlflow.db'}",
    ]
    missing = register("tiny", "--as", "students", "--run-dir", "nowhere")
    assert missing.returncode == 2 and "nowhere has no mlflow.db" in missing.stderr and "Traceback" not in missing.stderr
