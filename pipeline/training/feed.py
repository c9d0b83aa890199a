"""What each optimiser step trains on: its rows collated and, from a cache, its teacher states read, one step ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.data.batching import epoch_batches, micro_batches
from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.teacher.signal import TeacherSignal, TeacherSource


class Rows(Protocol):
    """The tokenised training rows."""

    @property
    def lengths(self) -> Sequence[int]:
        """Input tokens of each row."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> EncodedExample: ...


@dataclass(frozen=True)
class StepInput:
    """One optimiser step's input.

    Attributes:
        step: counted from 0.
        micro_batches: its rows, on the training device.
        signals: the teacher's states of each micro-batch; None asks the teacher when they are needed.
    """

    step: int
    micro_batches: tuple[Batch, ...]
    signals: tuple[TeacherSignal, ...] | None


@dataclass(frozen=True)
class Order:
    """Which rows make up which step; depends on the seed and the rows' lengths alone (hazard 12).

    Attributes:
        batch_size: rows of an optimiser step.
        micro_batch_size: rows of a forward pass.
        seed: the run's seed.
        total: steps of the run.
    """

    batch_size: int
    micro_batch_size: int
    seed: int
    total: int

    def steps(self, lengths: Sequence[int], first: int) -> Iterator[tuple[int, list[int]]]:
        """(step, row indices) from step `first` on."""
        per_epoch = math.ceil(len(lengths) / self.batch_size)
        step = first
        while step < self.total:
            order = epoch_batches(lengths, self.batch_size, self.seed, step // per_epoch)
            for batch in order[step % per_epoch :]:
                if step == self.total:
                    return
                yield step, batch
                step += 1


def feed(
    rows: Rows,
    order: Order,
    first: int,
    *,
    pad_token_id: int,
    device: torch.device,
    source: TeacherSource | None,
    layers: Sequence[int],
) -> Iterator[StepInput]:
    """Inputs of the steps from `first` on; while a step computes, a thread collates and reads the next one's.

    Args:
        rows: tokenised training rows.
        order: which of them belong to which step.
        first: first step.
        pad_token_id: any valid token id.
        device: where training runs.
        source: the teacher, None without one. Its signals are read ahead only if it says that this is sound.
        layers: teacher layers that will be asked for.

    Raises:
        CacheMismatchError: the cache lacks what a step needs; raised when that step is due.
    """
    reads = source if source is not None and source.reads_ahead else None

    def prepare(step: int, indices: list[int]) -> StepInput:
        parts = [
            collate([rows[i] for i in part], pad_token_id).to(device) for part in micro_batches(indices, order.micro_batch_size)
        ]
        signals = None if reads is None else tuple(reads.signal(part, layers) for part in parts)
        return StepInput(step, tuple(parts), signals)

    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        upcoming: Future[StepInput] | None = None
        for step, indices in order.steps(rows.lengths, first):
            ready, upcoming = upcoming, thread.submit(prepare, step, indices)
            if ready is not None:
                yield ready.result()
        if upcoming is not None:
            yield upcoming.result()
