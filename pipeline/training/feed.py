"""What each optimiser step trains on: its rows collated and, from a cache, its teacher states read, one step ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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


class Sampler(Protocol):
    """Writes the responses of some steps itself (on-policy training)."""

    def takes(self, step: int) -> bool:
        """Whether a step's responses are written."""
        ...

    def write(self, step: int, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
        """The rows with new responses; called when the step is due, on the thread that trains."""
        ...


@dataclass(frozen=True)
class StepInput:
    """One optimiser step's input.

    Attributes:
        step: counted from 0.
        micro_batches: its rows, on the training device.
        signals: the teacher's states of each micro-batch; None asks the teacher when they are needed.
        sampled: whether a sampler wrote the responses.
    """

    step: int
    micro_batches: tuple[Batch, ...]
    signals: tuple[TeacherSignal, ...] | None
    sampled: bool = False


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
    sampler: Sampler | None = None,
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
        sampler: writes the responses of some steps, each when it is due and not ahead: it depends on the steps before.

    Raises:
        CacheMismatchError: the cache lacks what a step needs; raised when that step is due.
    """
    reads = source if source is not None and source.reads_ahead else None

    def assemble(step: int, examples: Sequence[EncodedExample], sampled: bool) -> StepInput:
        cut = micro_batches(range(len(examples)), order.micro_batch_size)
        parts = tuple(collate([examples[i] for i in part], pad_token_id).to(device) for part in cut)
        signals = None if reads is None else tuple(reads.signal(part, layers) for part in parts)
        return StepInput(step, parts, signals, sampled)

    def prepare(step: int, indices: list[int]) -> Callable[[], StepInput]:
        """What is left to do when the step is due."""
        examples = [rows[i] for i in indices]
        if sampler is not None and sampler.takes(step):
            return lambda: assemble(step, sampler.write(step, examples), sampled=True)
        ready = assemble(step, examples, sampled=False)
        return lambda: ready

    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        upcoming: Future[Callable[[], StepInput]] | None = None
        for step, indices in order.steps(rows.lengths, first):
            due, upcoming = upcoming, thread.submit(prepare, step, indices)
            if due is not None:
                yield due.result()()
        if upcoming is not None:
            yield upcoming.result()()
