"""Where rows come from and how they are encoded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.base import LocalPath, Revision, Seeds, Strict
from pipeline.config.methods import Decoding


class LocalData(Strict):
    """A file on disk, relative to the working directory: .jsonl, .json, .csv or .parquet."""

    kind: Literal["local"]
    path: LocalPath
    skip: int = Field(default=0, ge=0)
    """Rows left out at the start of the file."""
    first: int | None = Field(default=None, ge=1)
    """Rows taken after that; null takes all."""


class HubData(Strict):
    """One file of a dataset repository on the hub."""

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[\w-]+(\.[\w-]+)*/[\w-]+(\.[\w-]+)*$")
    file: str = Field(pattern=r"^\w[\w-]*(\.[\w-]+)*(/\w[\w-]*(\.[\w-]+)*)*$")
    revision: Revision
    """Commit hash, tag or branch; resolved to a commit before anything runs."""
    skip: int = Field(default=0, ge=0)
    first: int | None = Field(default=None, ge=1)


class BundledData(Strict):
    """A file of the original instruction corpus inside this package (CC0)."""

    kind: Literal["bundled"]
    name: str
    skip: int = Field(default=0, ge=0)
    first: int | None = Field(default=None, ge=1)


class HeldOutData(Strict):
    """A seeded part of data.train that is kept out of training; sizes and seed are in data.held_out."""

    kind: Literal["held_out"]
    part: Literal["dev", "test"]


def _path_means_local(value: Any) -> Any:
    if isinstance(value, dict) and "kind" not in value and "path" in value:
        return {"kind": "local", **value}
    return value


DataSource = Annotated[
    Annotated[LocalData | HubData | BundledData | HeldOutData, Field(discriminator="kind")],
    BeforeValidator(_path_means_local),
]
TrainSource = Annotated[
    Annotated[LocalData | HubData | BundledData, Field(discriminator="kind")], BeforeValidator(_path_means_local)
]


class HeldOut(Strict):
    """Seeded dev and test parts drawn from data.train, chosen by example id, so that adding rows moves none."""

    seed: int = 0
    dev: int = Field(default=0, ge=0)
    test: int = Field(default=0, ge=0)


class DataConfig(Strict):
    """Rows for training and validation, and their encoding."""

    train: TrainSource
    dev: DataSource
    held_out: HeldOut = HeldOut()
    template: Literal["alpaca", "chat"] = "alpaca"
    """Prompt template: the paper's Alpaca-style text, or the tokenizer's own chat template."""
    max_prompt_tokens: int = Field(default=256, ge=8)
    max_tokens: int = Field(default=512, ge=16)
    """Prompt and response together; the response is cut there."""
    overlong: Literal["drop", "truncate_context"] = "drop"
    """Rows over max_prompt_tokens: dropped (paper), or cut in the middle of their input. Counted either way."""


class RowFilter(Strict):
    """Which rows of a test set count, by the length of their first reference; one of the two is given."""

    min_reference_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the experiment's tokenizer, special ones not counted."""
    min_reference_words: int | None = Field(default=None, ge=1)
    """Words between spaces: the same rows for every tokenizer."""

    @model_validator(mode="after")
    def _one_unit(self) -> RowFilter:
        if (self.min_reference_tokens is None) == (self.min_reference_words is None):
            raise ValueError("give exactly one of min_reference_tokens and min_reference_words")
        return self


class RowSample(Strict):
    """A seeded sample by example id: adding rows or changing their order moves none of those that stay in it."""

    rows: int = Field(ge=1)
    """At most so many; a smaller set is taken whole."""
    seed: int = 0


class Benchmark(Strict):
    """A test set and the protocol under which it is scored."""

    source: DataSource
    version: int = 1
    """Raise it when the rows or the protocol of this benchmark change meaning."""
    filter: RowFilter | None = None
    """null keeps every row."""
    sample: RowSample | None = None
    """Drawn from what the filter leaves; null takes all."""
    template: Literal["alpaca", "chat"] | None = None
    """null takes data.template."""
    max_prompt_tokens: int | None = Field(default=None, ge=8)
    """null takes data.max_prompt_tokens."""
    decoding: Decoding | None = None
    """null takes evaluation.decoding."""
    seeds: Seeds | None = None
    """Decoding seeds; null takes evaluation.seeds."""

    @model_validator(mode="after")
    def _distinct(self) -> Benchmark:
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeats a seed; give each once")
        return self
