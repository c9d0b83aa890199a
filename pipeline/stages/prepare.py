"""Stage 1: raw rows become tokenised Arrow files, one artifact for training and one per benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import Artifact
from pipeline.config.data import BundledData, DataConfig, HeldOut, HeldOutData, HubData, LocalData
from pipeline.data import prompts, sources, tokenize
from pipeline.data.examples import Example
from pipeline.errors import DataError
from pipeline.hub import resolve_revision
from pipeline.models.load import load_tokenizer
from pipeline.progress import progress
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place

VERSION = 1
TRAIN, DEV, DEV_PROMPTS, PROMPTS = "train.arrow", "dev.arrow", "dev_prompts.arrow", "prompts.arrow"


@dataclass(frozen=True)
class RowsPlan:
    """Rows from one source, or a held-out part of data.train.

    Attributes:
        what: dotted path of the setting, for messages.
        source: the file.
        digest: identity of the rows for fingerprints.
        held_out: sizes and seed of the parts drawn from `source`, None if the file is taken whole.
        part: "train", "dev" or "test" of the held-out split; ignored without one.
    """

    what: str
    source: sources.Source
    digest: str
    held_out: HeldOut | None
    part: str

    def read(self) -> list[Example]:
        """The rows.

        Raises:
            DataError: the file is missing, malformed or empty, or too small for its held-out parts.
        """
        rows = sources.read_examples(self.source)
        if self.held_out is None:
            return rows
        parts = {"dev": self.held_out.dev, "test": self.held_out.test}
        if sum(parts.values()) >= len(rows):
            raise DataError(
                f"data.held_out: {parts} asks for {sum(parts.values())} rows, but data.train has only {len(rows)}; lower them"
            )
        return sources.split_examples(rows, parts, self.held_out.seed)[self.part]

    def describe(self) -> str:
        """Where the rows come from, for people."""
        source = self.source
        if isinstance(source, sources.LocalSource):
            return str(source.path)
        if isinstance(source, sources.BundledSource):
            return f"pipeline/data/corpus/{source.name}.jsonl"
        return f"hf://datasets/{source.repo}@{source.revision}/{source.file}"

    def identity(self) -> dict[str, Any]:
        """What goes into a recipe."""
        return {"rows": self.digest, "held_out": self.held_out.model_dump() if self.held_out else None, "part": self.part}


@dataclass(frozen=True)
class TrainingDataPlan:
    """Training and dev rows of an experiment."""

    place: Place
    tokenizer: ModelPlan
    train: RowsPlan
    dev: RowsPlan
    config: DataConfig


@dataclass(frozen=True)
class BenchmarkPlan:
    """The prompts of one benchmark."""

    place: Place
    name: str
    version: int
    tokenizer: ModelPlan
    rows: RowsPlan
    config: DataConfig
    max_prompt_tokens: int


def plan_rows(source: LocalData | HubData | BundledData | HeldOutData, data: DataConfig, what: str) -> RowsPlan:
    """Resolve a configured source: files are hashed, hub revisions become commits.

    Raises:
        DataError: the file is not there, or the hub does not know it.
    """
    splits = data.held_out.dev + data.held_out.test > 0
    if isinstance(source, HeldOutData):
        base = plan_rows(data.train, data, "data.train")
        return RowsPlan(what, base.source, base.digest, data.held_out, source.part)
    resolved = _source(source, what)
    held_out = data.held_out if splits and what == "data.train" else None
    return RowsPlan(what, resolved, sources.source_digest(resolved), held_out, "train")


def plan_training_data(data: DataConfig, tokenizer: ModelPlan, root: Path) -> TrainingDataPlan:
    """Plan the training artifact."""
    train, dev = plan_rows(data.train, data, "data.train"), plan_rows(data.dev, data, "data.dev")
    recipe = {
        "train": train.identity(),
        "dev": dev.identity(),
        **_encoding(data, data.max_prompt_tokens),
        "max_tokens": data.max_tokens,
    }
    where = place(root, "prepare", VERSION, "prepare training rows", recipe, {"tokenizer": tokenizer.digest})
    return TrainingDataPlan(where, tokenizer, train, dev, data)


def plan_benchmark(name: str, benchmark: Any, data: DataConfig, tokenizer: ModelPlan, root: Path) -> BenchmarkPlan:
    """Plan one benchmark's artifact."""
    rows = plan_rows(benchmark.source, data, f"benchmarks.{name}.source")
    limit = benchmark.max_prompt_tokens or data.max_prompt_tokens
    recipe = {"test": rows.identity(), **_encoding(data, limit), "version": benchmark.version}
    where = place(root, "prepare", VERSION, f"prepare {name}", recipe, {"tokenizer": tokenizer.digest})
    return BenchmarkPlan(where, name, benchmark.version, tokenizer, rows, data, limit)


def run(plan: TrainingDataPlan) -> Artifact:
    """Tokenise training and dev rows.

    Raises:
        DataError: a file is malformed, or no row survives the token limits.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        tokenizer = load_tokenizer(plan.tokenizer.folder())
        config = plan.config
        counts: dict[str, Any] = {}
        dev = plan.dev.read()
        for name, rows, file in (("train", plan.train.read(), TRAIN), ("dev", dev, DEV)):
            with progress(f"tokenise {name}", len(rows), "rows") as advance:
                encoded, found = tokenize.encode_training(
                    rows,
                    tokenizer,
                    config.template,
                    max_prompt_tokens=config.max_prompt_tokens,
                    max_tokens=config.max_tokens,
                    overlong=config.overlong,
                    progress=advance,
                )
            _require_rows(encoded, getattr(plan, name).what, found)
            tokenize.write_encoded(folder / file, encoded)
            counts[name] = {
                **asdict(found),
                "tokens": sum(len(row.input_ids) for row in encoded),
                "response_tokens": sum(len(row.input_ids) - row.prompt_tokens for row in encoded),
            }
        dev_prompts, _ = tokenize.encode_prompts(
            dev, tokenizer, config.template, max_prompt_tokens=config.max_prompt_tokens, overlong=config.overlong
        )
        tokenize.write_prompts(folder / DEV_PROMPTS, dev_prompts)
        return counts

    return build(plan.place, work)


def run_benchmark(plan: BenchmarkPlan) -> Artifact:
    """Tokenise the prompts of a benchmark.

    Raises:
        DataError: the file is malformed, or no row survives the token limits.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(plan.tokenizer.folder())
        encoded, counts = tokenize.encode_prompts(
            plan.rows.read(),
            tokenizer,
            plan.config.template,
            max_prompt_tokens=plan.max_prompt_tokens,
            overlong=plan.config.overlong,
        )
        _require_rows(encoded, plan.rows.what, counts)
        tokenize.write_prompts(folder / PROMPTS, encoded)
        return asdict(counts)

    return build(plan.place, work)


def _encoding(data: DataConfig, max_prompt_tokens: int) -> dict[str, Any]:
    return {"template": prompts.template_id(data.template), "max_prompt_tokens": max_prompt_tokens, "overlong": data.overlong}


def _source(source: LocalData | HubData | BundledData, what: str) -> sources.Source:
    if isinstance(source, LocalData):
        return sources.LocalSource(source.path, source.first, source.skip)
    if isinstance(source, BundledData):
        return sources.BundledSource(source.name, source.first, source.skip)
    commit = resolve_revision(source.repo, source.revision, "dataset", what)
    return sources.HubSource(source.repo, source.file, commit, source.first, source.skip)


def _require_rows(rows: Sequence[object], what: str, counts: object) -> None:
    if not rows:
        raise DataError(
            f"{what}: no row is left ({counts}); raise data.max_prompt_tokens or set data.overlong=truncate_context"
        )
