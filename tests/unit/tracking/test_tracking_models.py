"""Students as MLflow models: what is logged loads everywhere, gives the same tokens, and is logged once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.artifacts import Artifact, Manifest, peek
from pipeline.data import prompts
from pipeline.errors import ArtifactError
from pipeline.mlflow_model import deliver_model, logged_model, model_name
from pipeline.stages import train
from pipeline.stages.fit import load_fitted

PROMPTS = ["the cat sat on", "red birds fly over the hills and", "rain"]
NEW_TOKENS = 9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """A tiny student trained with these settings."""
    folder = tmp_path_factory.mktemp("trained")

    def make(*overrides: str) -> Artifact:
        plan = stages.planned(
            folder, "train.seeds=[10]", "validation.select=loss", "train.learning_rate=1e-2", *overrides, methods={"kd": None}
        )
        return train.run(stages.training(stages.run_inputs(plan), "kd"))

    return make


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    experiment: str
    folder: Path

    def run(self, name: str = "kd s10") -> str:
        return str(self.client.create_run(self.experiment, run_name=name).info.run_id)

    def models(self) -> list[Any]:
        return list(self.client.search_logged_models([self.experiment]))

    def files(self, model_id: str) -> Path:
        return self.folder / "mlartifacts" / "models" / model_id / "artifacts"


@pytest.fixture
def store(tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    return Store(client, client.create_experiment("tiny", (tmp_path / "mlartifacts").as_uri()), tmp_path)


@torch.no_grad()
def greedy(model: PreTrainedModel, folder: Path, prompt: str) -> list[int]:
    """New tokens, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return [int(token) for token in made[0, ids["input_ids"].shape[1] :]]


def expected(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [greedy(model, folder, prompt) for prompt in PROMPTS]


def by_mlflow(uri: str) -> list[list[int]]:
    """New tokens, by the pipeline that MLflow loads, which is not told how to decode."""
    import mlflow.transformers

    pipeline = mlflow.transformers.load_model(uri)
    made = pipeline(PROMPTS, max_new_tokens=NEW_TOKENS, return_tensors=True)
    prompt = [len(pipeline.tokenizer(text)["input_ids"]) for text in PROMPTS]
    return [one[0]["generated_token_ids"][length:] for one, length in zip(made, prompt, strict=True)]


def test_everything_that_loads_it_gives_the_tokens_of_the_plain_folder(store: Store, trained: Callable[..., Artifact]) -> None:
    import mlflow.pyfunc
    import mlflow.transformers

    folder, run = trained().path / "model", store.run()
    uri = f"models:/{deliver_model(store.client, run, folder, 'kd s10')}"
    wanted = expected(folder)
    assert len({tuple(tokens) for tokens in wanted}) > 1
    parts = mlflow.transformers.load_model(uri, return_type="components")
    assert [greedy(parts["model"], folder, prompt) for prompt in PROMPTS] == wanted
    assert parts["tokenizer"](PROMPTS)["input_ids"] == AutoTokenizer.from_pretrained(folder)(PROMPTS)["input_ids"]
    assert by_mlflow(uri) == wanted
    texts = [text.strip() for text in parts["tokenizer"].batch_decode(wanted, skip_special_tokens=True)]
    assert mlflow.pyfunc.load_model(uri).predict(PROMPTS, params={"max_new_tokens": NEW_TOKENS}) == texts


def test_it_says_what_it_is_and_what_it_needs(store: Store, trained: Callable[..., Artifact]) -> None:
    from mlflow.models import Model

    artifact, run = trained(), store.run()
    model_id = deliver_model(store.client, run, artifact.path / "model", "kd s10")
    described = Model.load(f"models:/{model_id}")
    params = {one.name: one.default for one in described.signature.params}
    assert params.pop("max_new_tokens") == 256 and params.pop("do_sample") is False and "temperature" in params
    assert [str(column.type) for column in (*described.signature.inputs, *described.signature.outputs)] == [
        "DataType.string"
    ] * 2
    assert described.metadata == {
        "fingerprint": artifact.fingerprint, "method": "kd", "train_seed": 10, "template": "alpaca@1"
    }  # fmt: skip
    example = described.load_input_example(str(store.files(model_id)))
    assert example == [prompts.render("alpaca", "Name three rivers in Europe.", "", tiny.tokenizer())]
    needed = (store.files(model_id) / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needed
    assert {one.partition("==")[0] for one in needed} == {"mlflow", "torch", "transformers", "accelerate", "safetensors"}
    assert described.model_size_bytes == sum(
        file.stat().st_size for file in store.files(model_id).rglob("*") if file.is_file() and file.name != "MLmodel"
    )
    (logged,) = store.models()
    assert (logged.name, logged.source_run_id, logged.status.name) == ("kd s10", run, "READY")
    assert logged.tags["fingerprint"] == artifact.fingerprint and f"models:/{model_id}" in logged.tags["mlflow.note.content"]
    assert [one.model_id for one in store.client.get_run(run).outputs.model_outputs] == [model_id]


def test_the_weights_take_no_room_a_second_time(store: Store, trained: Callable[..., Artifact]) -> None:
    folder = trained().path / "model"
    files = store.files(deliver_model(store.client, store.run(), folder, "kd s10"))
    assert (files / "model" / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (files / "model" / "config.json").samefile(folder / "config.json")


def test_where_links_are_refused_the_weights_are_copied(
    store: Store, trained: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = trained().path / "model"
    files = store.files(deliver_model(store.client, store.run(), folder, "kd s10"))
    assert not (files / "model" / "model.safetensors").samefile(folder / "model.safetensors")
    assert (files / "model" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_store_elsewhere_is_sent_the_weights(
    store: Store, trained: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact import artifact_repository_registry

    folder = trained().path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(artifact_repository_registry, "get_artifact_repository", lambda uri: object())
        model_id = deliver_model(store.client, store.run(), folder, "kd s10")
    assert not (store.files(model_id) / "model" / "model.safetensors").samefile(folder / "model.safetensors")
    assert by_mlflow(f"models:/{model_id}") == expected(folder)


def test_a_model_is_logged_once(store: Store, trained: Callable[..., Artifact]) -> None:
    folder, run = trained().path / "model", store.run()
    first = deliver_model(store.client, run, folder, "kd s10")
    assert deliver_model(store.client, run, folder, "kd s10") == first
    assert [model.model_id for model in store.models()] == [first]
    other = store.run("kd s20")
    assert deliver_model(store.client, other, folder, "kd s20") != first
    found = logged_model(store.client, store.client.get_run(run))
    assert found is not None and found.model_id == first
    assert logged_model(store.client, store.client.get_run(store.run())) is None


@pytest.mark.parametrize("dies_in", ["log_model_artifacts", "log_outputs", "log_batch", "finalize_logged_model"])
def test_what_a_killed_process_began_is_finished(
    store: Store, trained: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder, run = trained().path / "model", store.run()
    store.client.log_metric(run, "dev/loss", 3.0, step=2)
    store.client.log_metric(run, "train/best_step", 2)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            deliver_model(store.client, run, folder, "kd s10")
    (begun,) = store.models()
    assert begun.status.name == "PENDING" and logged_model(store.client, store.client.get_run(run)) is None
    assert deliver_model(store.client, run, folder, "kd s10") == begun.model_id
    (model,) = store.models()
    assert model.status.name == "READY" and len(model.metrics) == 1
    assert len(store.client.get_run(run).outputs.model_outputs) == 1
    assert by_mlflow(f"models:/{model.model_id}") == expected(folder)


def test_its_page_has_the_scores_of_the_weights_that_were_kept(store: Store, trained: Callable[..., Artifact]) -> None:
    run = store.run()
    for step, value in enumerate([1.0, 7.0, 3.0]):
        store.client.log_metric(run, "dev/rouge_l", value, step=step)
    for name, value in {"train/best_step": 1, "eval/avg/rouge_l": 5, "eval/avg/rouge_l_decoding_std": 2, "cost/x": 9}.items():
        store.client.log_metric(run, name, value)
    deliver_model(store.client, run, trained().path / "model", "kd s10")
    (model,) = store.models()
    assert {metric.key: metric.value for metric in model.metrics} == {"dev/rouge_l": 7, "eval/avg/rouge_l": 5}


def test_an_adapter_is_logged_with_the_weights_that_it_belongs_to(store: Store, trained: Callable[..., Artifact]) -> None:
    artifact = trained("train.lora.rank=2")
    folder, base = artifact.path / "model", artifact.path.parents[1] / "student" / artifact.manifest.upstream["student"]
    model_id = deliver_model(store.client, store.run(), folder, "kd s10")
    assert (store.files(model_id) / "model" / "model.safetensors").samefile(base / "model.safetensors")
    assert any(line.startswith("peft==") for line in (store.files(model_id) / "requirements.txt").read_text().splitlines())
    merged = load_fitted(base, folder, torch.device("cpu"))
    wanted = [greedy(merged, folder, prompt) for prompt in PROMPTS]
    assert by_mlflow(f"models:/{model_id}") == wanted != expected(base)


def test_an_adapter_without_its_base_is_refused(store: Store, trained: Callable[..., Artifact], tmp_path: Path) -> None:
    shutil.copytree(trained("train.lora.rank=2").path, tmp_path / "artifacts" / "train" / "moved")
    with pytest.raises(ArtifactError, match="an adapter of the student .*, which is not there"):
        deliver_model(store.client, store.run(), tmp_path / "artifacts" / "train" / "moved" / "model", "kd s10")
    shutil.copytree(tmp_path / "artifacts" / "train" / "moved" / "model", tmp_path / "alone")
    with pytest.raises(ArtifactError, match="alone: an adapter outside its training's artifact; export it"):
        deliver_model(store.client, store.run(), tmp_path / "alone", "kd s10")
    assert store.models() == []


def test_nothing_pickled_and_no_code_is_taken(store: Store, tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "plain")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    model_id = deliver_model(store.client, store.run(), folder, "plain")
    suffixes = {file.suffix for file in store.files(model_id).rglob("*") if file.is_file()}
    assert suffixes == {"", ".json", ".safetensors", ".txt", ".yaml"}
    assert by_mlflow(f"models:/{model_id}") == expected(folder)


def test_a_folder_of_no_training_is_known_by_its_content(store: Store, tmp_path: Path) -> None:
    run, folder = store.run(), tiny.save(tiny.llama(), tmp_path / "plain")
    first = deliver_model(store.client, run, folder, "plain")
    assert deliver_model(store.client, run, folder, "plain") == first
    tiny.save(tiny.llama(seed=1), folder)
    assert deliver_model(store.client, run, folder, "plain") != first


def test_responses_end_where_the_evaluation_ended_them(store: Store, tmp_path: Path) -> None:
    import mlflow.transformers

    folder = tiny.save(tiny.llama(), tmp_path / "plain")
    first = expected(folder)[0][1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    tokenizer.save_pretrained(folder)
    pipeline = mlflow.transformers.load_model(f"models:/{deliver_model(store.client, store.run(), folder, 'plain')}")
    assert pipeline.model.generation_config.eos_token_id == first
    assert len(by_mlflow(f"models:/{store.models()[0].model_id}")[0]) == 2


@pytest.mark.parametrize("left", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(store: Store, tmp_path: Path, left: str) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "plain")
    for file in folder.iterdir():
        if file.name != left:
            file.unlink()
    with pytest.raises(ArtifactError, match="no model in safetensors with a config.json"):
        deliver_model(store.client, store.run(), folder, "plain")


def test_names_have_what_mlflow_takes() -> None:
    assert model_name("distilllens s10") == "distilllens s10"
    assert model_name("kd weight=0.5 a/b:c% s10") == "kd weight=0_5 a_b_c_ s10"


def test_the_command_line_of_mlflow_predicts_with_it(store: Store, trained: Callable[..., Artifact]) -> None:
    folder = trained().path / "model"
    model_id = deliver_model(store.client, store.run(), folder, "kd s10")
    asked = store.folder / "asked.json"
    asked.write_text(json.dumps({"inputs": PROMPTS, "params": {"max_new_tokens": NEW_TOKENS}}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", f"models:/{model_id}", "--env-manager", "local"]
    done = subprocess.run(
        [*command, "-i", str(asked), "-o", str(store.folder / "told.json")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = [text.strip() for text in tokenizer.batch_decode(expected(folder), skip_special_tokens=True)]
    assert json.loads((store.folder / "told.json").read_text()) == {"predictions": wanted}


def test_a_manifest_of_another_stage_tells_nothing(store: Store, trained: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = trained()
    upper = tmp_path / "artifacts" / "model" / "tuned"
    shutil.copytree(artifact.path.parents[1] / "student" / artifact.manifest.upstream["student"], upper)
    manifest = peek(upper)
    assert isinstance(manifest, Manifest) and manifest.stage == "student"
    shutil.copytree(artifact.path / "model", upper / "model")
    deliver_model(store.client, store.run(), upper / "model", "tuned")
    assert "method" not in store.models()[0].tags
