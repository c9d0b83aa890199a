"""Stage 1: raw rows become tokenised Arrow files, one artifact for training and one per benchmark."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from pipeline.data.examples import EncodedExample, EncodedPrompt, Example
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

    def open(self) -> sources.Rows:
        """The rows, to be gone through one at a time, as often as needed; held-out parts are drawn here, in a first pass.

        Raises:
            DataError: here or while they are read: the file is missing, malformed or empty, or too small for its held-out
                parts.
        """
        if self.held_out is None:
            return sources.Rows(self.source)
        parts = {"dev": self.held_out.dev, "test": self.held_out.test}
        contents = sources.count_contents(sources.iterate_examples(self.source))
        if sum(parts.values()) >= (rows := contents.total()):
            raise DataError(
                f"data.held_out: {parts} asks for {sum(parts.values())} rows, but data.train has only {rows}; lower them"
            )
        drawn = sources.draw_parts(contents, parts, self.held_out.seed)
        return sources.Rows(self.source, self.part, drawn, {**parts, "train": rows - sum(parts.values())})

    def count(self) -> int:
        """How many rows there are, after a look at each of them."""
        return self.open().count()

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
        train = plan.train.open()
        # A held-out dev part comes from the same draw.
        dev = plan.dev.open() if plan.dev.held_out is None else replace(train, part=plan.dev.part)
        counts = {
            name: _encode_training(rows, tokenizer, config, f"tokenise {name}", folder / file)
            for name, rows, file in (("train", train, TRAIN), ("dev", dev, DEV))
        }
        for name, found in counts.items():
            _require_rows(found, getattr(plan, name).what)
        encoded = tokenize.prompt_chunks(dev, tokenizer, config.template, config.max_prompt_tokens, config.overlong)
        tokenize.write_prompts(folder / DEV_PROMPTS, (row for kept, _ in encoded for row in kept))
        return counts

    return build(plan.place, work)


def run_benchmark(plan: BenchmarkPlan) -> Artifact:
    """Tokenise the prompts of a benchmark.

    Raises:
        DataError: the file is malformed, or no row survives the token limits.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(plan.tokenizer.folder())
        rows = long_enough = 0

        def filtered() -> Iterator[Example]:
            nonlocal rows, long_enough
            for chunk in tokenize.chunks(plan.rows.open()):
                kept = chunk if plan.spec.filter is None else filter_rows(chunk, plan.spec.filter, tokenizer)
                rows, long_enough = rows + len(chunk), long_enough + len(kept)
                yield from kept

        chosen = filtered() if plan.spec.sample is None else sample_rows(filtered(), plan.spec.sample)
        counts = tokenize.PromptCounts(0, 0, 0, 0)

        def encoded() -> Iterator[EncodedPrompt]:
            nonlocal counts
            limit, overlong = plan.max_prompt_tokens, plan.overlong
            for kept, found in tokenize.prompt_chunks(chosen, tokenizer, plan.template, limit, overlong):
                counts += found
                yield from kept

        tokenize.write_prompts(folder / PROMPTS, encoded())
        if not long_enough:
            raise DataError(f"benchmarks.{plan.name}.filter: no row of {rows} is left; lower it")
        _require_rows(asdict(counts), plan.rows.what)
        left_out = {"filtered_out": rows - long_enough, "not_sampled": long_enough - counts.rows}
        return {**asdict(counts), "rows": rows, **left_out}

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


def sample_rows(rows: Iterable[Example], sample: RowSample) -> list[Example]:
    """The rows whose hash of seed and id is lowest, in the order of `rows`; all where there are no more than asked for."""
    numbered = ((text_digest(f"{sample.seed}:{row.id}"), number, row) for number, row in enumerate(rows))
    drawn = heapq.nsmallest(sample.rows, numbered, key=lambda one: one[0])
    return [row for _, _, row in sorted(drawn, key=lambda one: one[1])]


def _encode_training(
    rows: sources.Rows, tokenizer: PreTrainedTokenizerBase, config: DataConfig, label: str, file: Path
) -> dict[str, Any]:
    """Tokenise rows into `file`; what the manifest says of them."""
    counts, tokens, prompt_tokens = tokenize.EncodingCounts(0, 0, 0, 0, 0, 0), 0, 0
    chunks = tokenize.training_chunks(
        rows, tokenizer, config.template, config.max_prompt_tokens, config.max_tokens, config.overlong
    )
    with progress(label, rows.count(), "rows") as advance:

        def encoded() -> Iterator[EncodedExample]:
            nonlocal counts, tokens, prompt_tokens
            for kept, found in chunks:
                counts += found
                tokens += sum(len(row.input_ids) for row in kept)
                prompt_tokens += sum(row.prompt_tokens for row in kept)
                yield from kept
                advance(found.rows)

        tokenize.write_encoded(file, encoded())
    return {**asdict(counts), "tokens": tokens, "response_tokens": tokens - prompt_tokens}


def _encoding(template: str, max_prompt_tokens: int, overlong: str) -> dict[str, Any]:
    return {"template": prompts.template_id(template), "max_prompt_tokens": max_prompt_tokens, "overlong": overlong}


def _source(source: LocalData | HubData | BundledData, what: str) -> sources.Source:
    if isinstance(source, LocalData):
        return sources.LocalSource(source.path, source.first, source.skip)
    if isinstance(source, BundledData):
        return sources.BundledSource(source.name, source.first, source.skip)
    commit = resolve_revision(source.repo, source.revision, "dataset", what)
    return sources.HubSource(source.repo, source.file, commit, source.first, source.skip, what)


def _require_rows(counts: Mapping[str, Any], what: str) -> None:
    if not counts["kept"]:
        raise DataError(
            f"{what}: no row is left ({counts}); raise data.max_prompt_tokens or set data.overlong=truncate_context"
        )
