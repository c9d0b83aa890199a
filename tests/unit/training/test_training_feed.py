from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.data.batching import epoch_batches
from pipeline.data.collate import Batch
from pipeline.data.examples import EncodedExample
from pipeline.errors import CacheMismatchError
from pipeline.training.feed import Order, StepInput, feed

CPU = torch.device("cpu")


class Dataset(list[EncodedExample]):
    @property
    def lengths(self) -> list[int]:
        return [len(row.input_ids) - 1 for row in self]


ROWS = Dataset(EncodedExample(f"e{i}", tuple(range(3, 9 + 3 * (i % 4))), 2) for i in range(10))


class Recording:
    """A source that notes which batches it read, on which thread, and fails on demand."""

    num_layers = 4

    def __init__(self, ahead: bool, fail_at: int | None = None) -> None:
        self.reads_ahead = ahead
        self.read: list[tuple[str, ...]] = []
        self.threads: set[int] = set()
        self.fail_at = fail_at

    def signal(self, batch: Batch, layers: Sequence[int]) -> Any:
        if self.fail_at == len(self.read):
            raise CacheMismatchError("from the thread")
        self.read.append(batch.example_ids)
        self.threads.add(threading.get_ident())
        return batch.example_ids, tuple(layers)


def run(source: Any, first: int = 0) -> Any:
    return feed(ROWS, Order(4, 2, 7, 5), first, pad_token_id=0, device=CPU, source=source, layers=(2, 3))


def ids(step: StepInput) -> list[tuple[str, ...]]:
    return [batch.example_ids for batch in step.micro_batches]


def test_steps_follow_the_epochs_in_micro_batches() -> None:
    order = [epoch_batches(ROWS.lengths, 4, 7, epoch) for epoch in (0, 1)]
    expected = [[ROWS[i].id for i in batch] for epoch in order for batch in epoch][:5]
    steps = list(run(None))
    assert [step.step for step in steps] == [0, 1, 2, 3, 4]
    assert [[name for part in ids(step) for name in part] for step in steps] == expected
    assert all(len(part) <= 2 for step in steps for part in ids(step))


def test_a_later_start_gives_the_same_steps() -> None:
    assert [ids(step) for step in run(None, first=3)] == [ids(step) for step in run(None)][3:]


def test_signals_are_read_on_another_thread_one_step_ahead() -> None:
    source = Recording(ahead=True)
    steps = run(source)
    first = next(steps)
    assert first.signals == tuple((part, (2, 3)) for part in ids(first))
    second = next(steps)
    assert source.read[:4] == ids(first) + ids(second)
    assert len(source.read) <= 6  # never more than one step beyond
    steps.close()
    assert source.threads and threading.get_ident() not in source.threads
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


def test_a_teacher_that_computes_is_not_asked_ahead() -> None:
    source = Recording(ahead=False)
    assert all(step.signals is None for step in run(source))
    assert source.read == []


def test_a_failure_is_raised_when_its_step_is_due() -> None:
    seen = []
    with pytest.raises(CacheMismatchError, match="from the thread"):
        for step in run(Recording(ahead=True, fail_at=2)):
            seen.append(step.step)
    assert seen == [0]
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


class Echo:
    """A sampler that takes odd steps and notes when and where it was asked."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.threads: set[int] = set()

    def takes(self, step: int) -> bool:
        return step % 2 == 1

    def write(self, step: int, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
        self.events.append(("write", step))
        self.threads.add(threading.get_ident())
        return [EncodedExample(row.id, (*row.input_ids[: row.prompt_tokens], 77), row.prompt_tokens) for row in rows]


def test_a_sampler_writes_its_steps_when_they_are_due_and_not_ahead() -> None:
    sampler = Echo()
    order = Order(4, 2, 7, 5)
    steps = feed(ROWS, order, 0, pad_token_id=0, device=CPU, source=None, layers=(), sampler=sampler)
    given = list(run(None))
    for expected in given:
        found = next(steps)
        sampler.events.append(("train", found.step))
        assert ids(found) == ids(expected) and found.sampled == (found.step % 2 == 1)
        labels = torch.cat([batch.response_labels for batch in found.micro_batches])
        assert (set(labels.tolist()) == {77}) == found.sampled
    due = [("train", 0), ("write", 1), ("train", 1), ("train", 2), ("write", 3), ("train", 3), ("train", 4)]
    assert sampler.events == due and sampler.threads == {threading.get_ident()}
