"""A trained student as a model of its MLflow run, in the form that `mlflow models` and `mlflow.transformers` load."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.artifacts import MANIFEST, Manifest, canonical_json, file_digest, peek, text_digest
from pipeline.errors import ArtifactError, PipelineError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run
    from mlflow.models import ModelSignature
    from transformers import PreTrainedTokenizerBase

FINGERPRINT = "fingerprint"
"""Tag of a logged model: the fingerprint of the training that made it."""
_MODEL, _PEFT = "model", "peft"
"""Folders of a logged model: the weights, and an adapter for them."""
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_TEXTS = (".json", ".txt", ".jinja", ".model")  # configuration and tokenizer; nothing pickled and no code is ever taken
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")
_NOTE = "mlflow.note.content"  # what the UI shows as a description
_QUESTION = "Name three rivers in Europe."


@dataclass(frozen=True)
class _Student:
    """What is logged.

    Attributes:
        folder: the trained weights, or the adapter that was trained, with the tokenizer.
        base: where the whole weights are; `folder`, unless that is an adapter.
        fingerprint: of the training; of the content where there is no manifest.
        about: what the training's manifest says of it.
    """

    folder: Path
    base: Path
    fingerprint: str
    about: Mapping[str, Any]

    @property
    def adapter(self) -> bool:
        """Whether only an adapter was trained."""
        return self.base != self.folder

    def weights(self) -> dict[str, Path]:
        """Path in the logged model → file, of everything that is big."""
        found = {f"{_MODEL}/{file.name}": file for file in sorted(self.base.glob("*.safetensors"))}
        return found | ({f"{_PEFT}/{name}": self.folder / name for name in _ADAPTER} if self.adapter else {})


def deliver_model(client: MlflowClient, run_id: str, model: Path, name: str) -> str:
    """Log a trained student as a model of its run: flavour transformers, signature, input example, pinned requirements.

    The weights are not loaded. Where the store keeps artifacts in a folder of this file system they are hard links, elsewhere
    they are uploaded. An adapter is logged beside the untrained weights that it belongs to. Called again after any failure,
    it finishes the model that the first call began; for one run, one call at a time.

    Args:
        client: of the store.
        run_id: the run that trained it.
        model: the plain transformers folder in a training's artifact, or any other.
        name: of the logged model; what MLflow does not take in a name becomes "_".

    Returns:
        Its id: `models:/ID` loads it.

    Raises:
        ArtifactError: the folder has no model in safetensors, or an adapter's base is not there.
        MlflowException: the store does not answer.
    """
    student, run = _student(model), client.get_run(run_id)
    logged = _begun(client, run, student, model_name(name)) or client.create_logged_model(
        run.info.experiment_id, model_name(name), run_id, tags=_tags(student), params=run.data.params, model_type="student"
    )
    if logged.status.name == "READY":
        return str(logged.model_id)
    with tempfile.TemporaryDirectory(prefix="distilllens-model-") as scratch:
        described = Path(scratch) / "logged"
        _describe(student, logged, run_id, described)
        client.log_model_artifacts(logged.model_id, str(described))
    _place(client, logged, student.weights())
    _show(client, run, student, logged.model_id)
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def logged_model(client: MlflowClient, run: Run) -> LoggedModel | None:
    """The model of a run that can be loaded, None where none was logged."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    return next((logged for logged in found if logged.status.name == "READY"), None)


def is_score(metric: str) -> bool:
    """Whether a metric of a run says how good its student is: measured on dev rows, or on test rows ("eval/…")."""
    return metric.startswith(("dev/", "eval/")) and not metric.endswith("_decoding_std")


def score(client: MlflowClient, run: Run, metric: str) -> Metric | None:
    """A run's score, if it has it; on dev rows, that of the step whose weights were kept."""
    history = client.get_metric_history(run.info.run_id, metric)
    if metric.startswith("dev/"):
        history = [entry for entry in history if entry.step == run.data.metrics.get("train/best_step")]
    return history[-1] if history else None


def model_name(name: str) -> str:
    """A name that MLflow takes for a logged model; "kd weight=0.5 s10" becomes "kd weight=0_5 s10"."""
    return re.sub(r"[/:.%\"']", "_", name)


def _student(folder: Path) -> _Student:
    manifest = _training(folder)
    base = _base(folder, manifest) if (folder / _ADAPTER[0]).is_file() else folder
    if not (base / "config.json").is_file() or not any(base.glob("*.safetensors")):
        raise ArtifactError(f"{base}: no model in safetensors with a config.json; give the model folder of a training")
    if manifest is None:
        digests = {file.name: file_digest(file) for file in _files(folder)}
        return _Student(folder, base, text_digest(canonical_json(digests))[:16], {})
    recipe = manifest.recipe
    about = {"method": recipe["method"]["kind"], "train_seed": recipe["seed"], "template": _template(folder, manifest)}
    return _Student(folder, base, manifest.fingerprint, about)


def _training(folder: Path) -> Manifest | None:
    """The manifest of the training that left the folder."""
    manifest = peek(folder.parent)
    return manifest if manifest is not None and manifest.stage == "train" else None


def _base(folder: Path, manifest: Manifest | None) -> Path:
    """The untrained student that an adapter belongs to."""
    if manifest is None:
        raise ArtifactError(f"{folder}: an adapter outside its training's artifact; export it, which merges it, and log that")
    base = folder.parents[2] / "student" / manifest.upstream["student"]
    if peek(base) is None:
        raise ArtifactError(f"{folder}: an adapter of the student {base}, which is not there; give its --run-dir")
    return base


def _template(folder: Path, manifest: Manifest) -> str:
    prepared = peek(folder.parents[2] / "prepare" / manifest.upstream["prepare"])
    return "not known" if prepared is None else str(prepared.recipe["template"])


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in (*_TEXTS, ".safetensors") and file.is_file()]


def _tags(student: _Student) -> dict[str, str]:
    return {FINGERPRINT: student.fingerprint, **{key: str(value) for key, value in student.about.items()}}


def _begun(client: MlflowClient, run: Run, student: _Student, name: str) -> LoggedModel | None:
    """What an earlier call made, finished or not."""
    wanted = f"source_run_id = '{run.info.run_id}' AND name = '{name}' AND tags.{FINGERPRINT} = '{student.fingerprint}'"
    found = client.search_logged_models([run.info.experiment_id], wanted)
    return min(found, key=lambda logged: logged.status.name != "READY", default=None)


def _describe(student: _Student, logged: LoggedModel, run_id: str, target: Path) -> None:
    """Everything but the weights.

    In the layout of `mlflow.transformers.save_model`, whose own way of taking a checkpoint's path fails with transformers 5
    and copies the weights. Both classes are the automatic ones: for the name of a class that transformers does not have,
    MLflow would run code from the model's folder.
    """
    import transformers
    from mlflow import pyfunc
    from mlflow.models import Model
    from mlflow.models.utils import _save_example
    from mlflow.utils.environment import _process_pip_requirements, _PythonEnv

    tokenizer = _write_texts(student, target)
    described = Model(
        artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id,
        metadata={FINGERPRINT: student.fingerprint, **student.about}, signature=signature(),
    )  # fmt: skip
    _save_example(described, [_example(student, tokenizer)], str(target))
    adapter = {"peft_adaptor": _PEFT} if student.adapter else {}
    described.add_flavor(
        "transformers", transformers_version=transformers.__version__, task="text-generation",
        instance_type="TextGenerationPipeline", source_model_name=f"training {student.fingerprint}", model_binary=_MODEL,
        pipeline_model_type="AutoModelForCausalLM", components=["tokenizer"], tokenizer_type="AutoTokenizer", **adapter,
    )  # fmt: skip
    pyfunc.add_to_model(described, "mlflow.transformers", conda_env="conda.yaml", python_env="python_env.yaml")
    conda, requirements, _ = _process_pip_requirements(None, _requirements(student.adapter))  # type: ignore[no-untyped-call]
    (target / "conda.yaml").write_text(yaml.safe_dump(conda, sort_keys=False), encoding="utf-8")
    (target / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    _PythonEnv.current().to_yaml(str(target / "python_env.yaml"))  # type: ignore[no-untyped-call]
    files = [*student.weights().values(), *(file for file in target.rglob("*") if file.is_file())]
    described.model_size_bytes = sum(file.stat().st_size for file in files)
    described.save(str(target / "MLmodel"))


def signature() -> ModelSignature:
    """Text in, response out; greedy unless a request asks to sample. Names are those of transformers' `generate`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec(DataType.string)])
    params = [
        ParamSpec("max_new_tokens", DataType.long, 256),
        ParamSpec("do_sample", DataType.boolean, False),
        ParamSpec("temperature", DataType.double, 1.0),
        ParamSpec("top_p", DataType.double, 1.0),
        ParamSpec("top_k", DataType.long, 50),
        ParamSpec("return_full_text", DataType.boolean, False),
    ]
    return ModelSignature(inputs=text, outputs=text, params=ParamSchema(params))


def _write_texts(student: _Student, target: Path) -> PreTrainedTokenizerBase:
    """Configuration and tokenizer; returns the tokenizer."""
    from pipeline.models.load import load_tokenizer

    folder = target / _MODEL
    folder.mkdir(parents=True)
    for source in dict.fromkeys((student.base, student.folder)):
        for file in _files(source):
            if file.suffix in _TEXTS and file.name not in (MANIFEST, *_ADAPTER):
                shutil.copyfile(file, folder / file.name)
    tokenizer, generation = load_tokenizer(folder), folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    settings.pop("_from_model_config", None)  # it would let the model's configuration overrule what follows
    # As `export` does: responses end where the evaluation ended them. And a pipeline would sample where nothing is said.
    settings = {"do_sample": False, **settings, "eos_token_id": tokenizer.eos_token_id}
    generation.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(target / "components" / "tokenizer")
    return tokenizer


def _example(student: _Student, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt in the form that the student was trained on."""
    from pipeline.data import prompts

    with contextlib.suppress(PipelineError):  # a template that is not known, or of another version of this project
        return prompts.render(str(student.about.get("template")).partition("@")[0], _QUESTION, "", tokenizer)
    return _QUESTION


def _requirements(adapter: bool) -> list[str]:
    names = (*_PACKAGES, "peft") if adapter else _PACKAGES
    # The local part of a version ("+cpu") is that of a build, which no index has.
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def _place(client: MlflowClient, logged: LoggedModel, weights: Mapping[str, Path]) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    where = get_artifact_repository(logged.artifact_location)
    for name, file in weights.items():
        if isinstance(where, LocalArtifactRepository):
            _link(file, Path(where.artifact_dir) / name)
        else:
            client.log_model_artifact(logged.model_id, str(file), str(Path(name).parent))


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy on another file system and on one that has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # of a call that did not end
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _show(client: MlflowClient, run: Run, student: _Student, model_id: str) -> None:
    """The model on the run's page, and on its own page the run's scores and how to load it."""
    from mlflow.entities import LoggedModelOutput, Metric

    shown = run.outputs.model_outputs if run.outputs else []
    if model_id not in {output.model_id for output in shown}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, 0)])
    scores = [score(client, run, name) for name in run.data.metrics if is_score(name)]
    metrics = [Metric(one.key, one.value, one.timestamp, one.step, model_id=model_id) for one in scores if one is not None]
    client.log_batch(run.info.run_id, metrics=metrics)
    facts = {**student.about, "training": student.fingerprint}
    about = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())
    client.set_logged_model_tags(model_id, {_NOTE: f'{about}\n\n`mlflow.transformers.load_model("models:/{model_id}")`'})
