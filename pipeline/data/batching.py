"""The order of training: length-bucketed batches that depend on the seed, the epoch and the lengths, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BUCKET_BATCHES = 50


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of similar lengths for one epoch, in random order.

    The rows are shuffled, cut into buckets of up to 50 batches, sorted by length inside each bucket and cut into batches;
    then the batches are shuffled. There are at least two buckets wherever there are two batches, so which rows share a
    batch changes from epoch to epoch. Nothing depends on workers or processes (hazard 12).

    Args:
        lengths: input tokens of each row.
        batch_size: rows of a batch.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        Row indices; every row once. Rows that fill no batch form a short last one, taken from a random length.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    short: list[list[int]] = []
    for bucket in np.split(order, _edges(len(lengths), batch_size)):
        bucket = bucket[np.argsort(sizes[bucket], kind="stable")]
        full, rest = _cut(bucket, batch_size, generator)
        batches += full
        short += rest
    return [batches[index] for index in generator.permutation(len(batches))] + short


def micro_batches(batch_indices: Sequence[int], micro_size: int) -> list[list[int]]:
    """A batch in consecutive parts of at most `micro_size` rows; neighbours have similar lengths, so parts pad less."""
    if micro_size < 1:
        raise ValueError(f"micro_size={micro_size} must be at least 1")
    return [list(batch_indices[start : start + micro_size]) for start in range(0, len(batch_indices), micro_size)]


def padding_fraction(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of padding in all tokens of `batches`, each padded to its longest row; in [0, 1).

    Args:
        lengths: input tokens of each row.
        batches: row indices of each batch.
    """
    real = sum(lengths[row] for batch in batches for row in batch)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1.0 - real / padded


def _edges(rows: int, batch_size: int) -> list[int]:
    """Where buckets begin, the first excepted: buckets of about as many batches each, the smaller ones first."""
    batches = -(-rows // batch_size)
    buckets = max(1, min(batches, max(2, -(-batches // _BUCKET_BATCHES))))
    return [batches * bucket // buckets * batch_size for bucket in range(1, buckets)]


def _cut(bucket: NDArray[np.int64], batch_size: int, generator: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
    """Full batches and the remainder; the remainder is cut out at a random length, else it would always be the longest rows."""
    count, remainder = divmod(len(bucket), batch_size)
    if not remainder:
        return bucket.reshape(count, batch_size).tolist(), []
    first = int(generator.integers(count + 1)) * batch_size
    full = np.concatenate([bucket[:first], bucket[first + remainder :]])
    return full.reshape(count, batch_size).tolist(), [bucket[first : first + remainder].tolist()]
