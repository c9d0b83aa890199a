"""All rows of a file at once, and their tokens: the stages take some at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.data.examples import EncodedExample, Example
from pipeline.data.sources import Source, iterate_examples
from pipeline.data.tokenize import EncodingCounts, training_chunks


def read_examples(source: Source) -> list[Example]:
    return list(iterate_examples(source))


def encode_training(examples: Iterable[Example], *settings: Any) -> tuple[list[EncodedExample], EncodingCounts]:
    """As `training_chunks`, with its arguments."""
    chunks = list(training_chunks(examples, *settings))
    counts = sum((found for _, found in chunks), EncodingCounts(0, 0, 0, 0, 0, 0))
    return [row for rows, _ in chunks for row in rows], counts
