"""Stage 1: raw rows become tokenised Arrow files, one artifact for training and one per benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import Artifact, text_digest
from pipeline.config.data import (
    Benchmark,
    BundledData,
    DataConfig,
    HeldOut,
    HeldOutData,
    HubData,
    LocalData,
    RowFilter,
    RowSample,
)
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
    """The prompts of one benchmark.

    Attributes:
        place: the artifact.
        name: in the experiment.
        spec: its settings.
        tokenizer, rows: the inputs.
        template, max_prompt_tokens, overlong: how rows become prompts, resolved.
    """

    place: Place
    name: str
    spec: Benchmark
    tokenizer: ModelPlan
    rows: RowsPlan
    template: str
    max_prompt_tokens: int
    overlong: tokenize.Overlong

    def protocol(self) -> dict[str, Any]:
        """Which rows are asked and how, wherever they lie and whatever model answers."""
        return {
            "benchmark": self.name,
            "version": self.spec.version,
            "source": self.rows.identity(),
            "filter": None if self.spec.filter is None else self.spec.filter.model_dump(),
            "sample": None if self.spec.sample is None else self.spec.sample.model_dump(),
            "template": prompts.template_id(self.template),
            "max_prompt_tokens": self.max_prompt_tokens,
            "overlong": self.overlong,
        }


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
        **_encoding(data.template, data.max_prompt_tokens, data.overlong),
        "max_tokens": data.max_tokens,
    }
    where = place(root, "prepare", VERSION, "prepare training rows", recipe, {"tokenizer": tokenizer.digest})
    return TrainingDataPlan(where, tokenizer, train, dev, data)


def plan_benchmark(name: str, benchmark: Benchmark, data: DataConfig, tokenizer: ModelPlan, root: Path) -> BenchmarkPlan:
    """Plan one benchmark's artifact."""
    rows = plan_rows(benchmark.source, data, f"benchmarks.{name}.source")
    limit, template = benchmark.max_prompt_tokens or data.max_prompt_tokens, benchmark.template or data.template
    recipe = {"test": rows.identity(), **_encoding(template, limit, data.overlong), "version": benchmark.version}
    chosen = {"filter": benchmark.filter, "sample": benchmark.sample}
    recipe |= {key: value.model_dump() for key, value in chosen.items() if value is not None}
    where = place(root, "prepare", VERSION, f"prepare {name}", recipe, {"tokenizer": tokenizer.digest})
    return BenchmarkPlan(where, name, benchmark, tokenizer, rows, template, limit, data.overlong)


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
        rows = plan.rows.read()
        long_enough = rows if plan.spec.filter is None else filter_rows(rows, plan.spec.filter, tokenizer)
        if not long_enough:
            raise DataError(f"benchmarks.{plan.name}.filter: no row of {len(rows)} is left; lower it")
        chosen = long_enough if plan.spec.sample is None else sample_rows(long_enough, plan.spec.sample)
        encoded, counts = tokenize.encode_prompts(
            chosen, tokenizer, plan.template, max_prompt_tokens=plan.max_prompt_tokens, overlong=plan.overlong
        )
        _require_rows(encoded, plan.rows.what, counts)
        tokenize.write_prompts(folder / PROMPTS, encoded)
        left_out = {"filtered_out": len(rows) - len(long_enough), "not_sampled": len(long_enough) - len(chosen)}
        return {**asdict(counts), "rows": len(rows), **left_out}

    return build(plan.place, work)


def filter_rows(rows: Sequence[Example], wanted: RowFilter, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The rows whose first reference is long enough, in order."""
    references = [row.references[0] for row in rows]
    if wanted.min_reference_words is not None:
        lengths, least = [len(text.split()) for text in references], wanted.min_reference_words
    else:
        assert wanted.min_reference_tokens is not None  # the configuration has one of the two
        ids = tokenizer(references, add_special_tokens=False, verbose=False)["input_ids"]
        lengths, least = [len(tokens) for tokens in ids], wanted.min_reference_tokens
    return [row for row, length in zip(rows, lengths, strict=True) if length >= least]


def sample_rows(rows: Sequence[Example], sample: RowSample) -> list[Example]:
    """The rows whose hash of seed and id is lowest, in the order of `rows`; all where there are no more than asked for."""
    drawn = sorted((row.id for row in rows), key=lambda name: text_digest(f"{sample.seed}:{name}"))[: sample.rows]
    chosen = set(drawn)
    return [row for row in rows if row.id in chosen]


def _encoding(template: str, max_prompt_tokens: int, overlong: str) -> dict[str, Any]:
    return {"template": prompts.template_id(template), "max_prompt_tokens": max_prompt_tokens, "overlong": overlong}


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
