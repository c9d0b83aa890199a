"""What each optimiser step trains on: its rows collated and, from a cache, its teacher states read, one step ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pipeline.data.batching import epoch_batches, micro_batches
from pipeline.data.collate import IGNORE_INDEX, Batch, collate
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
        micro_batches: its rows, on the training device; with several processes this one's share of them.
        signals: the teacher's states of each micro-batch; None asks the teacher when they are needed.
        sampled: whether a sampler wrote the responses.
        indices: the rows of the whole step.
    """

    step: int
    micro_batches: tuple[Batch, ...]
    signals: tuple[TeacherSignal, ...] | None
    sampled: bool = False
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    """Which rows of a step a process takes: every `size`-th, since neighbours have similar lengths.

    Attributes:
        rank: of this process, counted from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def of(self, rows: Sequence[int]) -> list[int]:
        """This process's rows; none where there are fewer rows than processes."""
        return list(rows[self.rank :: self.size])

    def rounds(self, rows: int, micro_batch_size: int) -> int:
        """Micro-batches that every process makes of a step of `rows` rows: as many as the first, whose share is the largest."""
        return math.ceil(math.ceil(rows / self.size) / micro_batch_size)


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
    share: Share = Share(),  # noqa: B008
) -> Generator[StepInput]:
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
        share: this process's part of every step. Where another process makes more micro-batches, blank ones follow (a row
            without response tokens): all processes make equally many passes.

    Raises:
        CacheMismatchError: the cache lacks what a step needs; raised when that step is due.
    """
    reads = source if source is not None and source.reads_ahead else None

    def assemble(step: int, indices: list[int], examples: Sequence[EncodedExample], sampled: bool) -> StepInput:
        cut = micro_batches(range(len(examples)), order.micro_batch_size)
        parts = [collate([examples[i] for i in part], pad_token_id).to(device) for part in cut]
        missing = share.rounds(len(indices), order.micro_batch_size) - len(parts)
        if missing:
            parts += [collate([rows[indices[0]]], pad_token_id).to(device)] * missing
        signals = None if reads is None else tuple(reads.signal(part, layers) for part in parts)
        given = len(parts) - missing
        return StepInput(step, (*parts[:given], *map(blank, parts[given:])), signals, sampled, tuple(indices))

    def prepare(step: int, indices: list[int]) -> Callable[[], StepInput]:
        """What is left to do when the step is due."""
        examples = [rows[i] for i in share.of(indices)]
        if sampler is not None and sampler.takes(step):
            return lambda: assemble(step, indices, sampler.write(step, examples) if examples else (), sampled=True)
        ready = assemble(step, indices, examples, sampled=False)
        return lambda: ready

    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        upcoming: Future[Callable[[], StepInput]] | None = None
        for step, indices in order.steps(rows.lengths, first):
            due, upcoming = upcoming, thread.submit(prepare, step, indices)
            if due is not None:
                yield due.result()()
        if upcoming is not None:
            yield upcoming.result()()


def blank(batch: Batch) -> Batch:
    """The batch without its response: a pass over it costs time and gives zeros."""
    return replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORE_INDEX),
        response_positions=batch.response_positions[:0],
        response_counts=(0,) * len(batch.response_counts),
    )
