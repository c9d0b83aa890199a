"""Killed at any moment, a run goes on: one more call, and everything is as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import faults_run
import pytest
from faults_results import differences, results
from faults_run import CHECKPOINT_EVERY, STAGES, Ended, Fault, Process
from faults_setup import ALL, Tally, Undisturbed

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
AGAIN = {"step": CHECKPOINT_EVERY, "captured": 4, "decoded": 1}
"""At most so much is done twice: a checkpoint interval, the batches of a shard, a batch of generations."""
MOMENTS = 3 if ALL else 1
CHOSEN = [(stage, number) for stage in STAGES for number in CODES]
if not ALL:
    CHOSEN = [("cache", signal.SIGKILL), ("train", signal.SIGKILL), ("train", signal.SIGTERM), ("evaluate", signal.SIGKILL)]


def lost(run: Undisturbed, run_dir: Path, scratch: Path, ended: Ended, code: int, work: dict[str, int]) -> str:
    """What a fault cost beyond what it may, after one more run; empty if nothing. `work` is what an undisturbed run takes."""
    if ended.code != code:
        return f"exit code {ended.code}, expected {code}:\n{ended.log}"
    again = faults_run.run(run.folder, run_dir, scratch)
    if again.code != 0:
        return f"the next run ends with code {again.code}:\n{again.log}"
    for kind, most in AGAIN.items():
        extra = ended.work.get(kind, 0) + again.work.get(kind, 0) - work.get(kind, 0)
        if extra > most:
            return f"{extra} {kind} again, at most {most} allowed:\n{ended.log}\n{again.log}"
    return differences(run.results, results(run_dir))


@pytest.fixture(scope="module")
def alone(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """One stage without any fault."""

    @functools.cache
    def run(stage: str) -> Ended:
        folder = tmp_path_factory.mktemp(stage)
        return faults_run.run(undisturbed.folder, undisturbed.copy_without(stage, folder / "runs"), folder / "scratch")

    return run


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize(("stage", "number"), CHOSEN, ids=[f"{stage}-{number.name}" for stage, number in CHOSEN])
def test_a_signal_at_a_seeded_moment(
    stage: str,
    number: signal.Signals,
    moment: int,
    undisturbed: Undisturbed,
    alone: Callable[[str], Ended],
    tmp_path: Path,
    tally: Tally,
) -> None:
    events = alone(stage).events
    event = random.Random(f"{stage} {number} {moment}").randrange(len(events))
    run_dir = undisturbed.copy_without(stage, tmp_path / "runs")
    ended = faults_run.run(undisturbed.folder, run_dir, tmp_path / "scratch", Fault(number, event))
    what = lost(undisturbed, run_dir, tmp_path / "scratch", ended, CODES[number], alone(stage).work)
    tally(f"{number.name} in {stage}", not what, f"before change {event}, {events[event]}:\n{what}")


@pytest.mark.parametrize("moment", range(6 if ALL else 0))
def test_a_signal_at_any_time_of_a_whole_run(moment: int, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    number = list(CODES)[moment % len(CODES)]
    process = Process(undisturbed.folder, tmp_path / "runs", tmp_path / "scratch")
    assert not process.wait_until(random.Random(moment).uniform(0.2, 2.5)), "the run is over before its signal"
    os.kill(process.pid, number)
    ended = process.wait(10)
    what = lost(undisturbed, tmp_path / "runs", tmp_path / "scratch", ended, CODES[number], undisturbed.work)
    tally(f"{number.name} at any time", not what, what)


def after_the_first_step(events: list[str]) -> int:
    """The change that follows the first metrics of a training: the next is those of its second step."""
    return next(index for index, event in enumerate(events) if event.endswith("/metrics.jsonl")) + 1


def test_the_first_sigterm_ends_training_with_a_checkpoint(
    undisturbed: Undisturbed, alone: Callable[[str], Ended], tmp_path: Path, tally: Tally
) -> None:
    run_dir, event = undisturbed.copy_without("train", tmp_path / "runs"), after_the_first_step(alone("train").events)
    process = Process(undisturbed.folder, run_dir, tmp_path / "scratch", Fault(signal.SIGTERM, event))
    ended = process.wait(60)
    assert "stopped after step 3 of 6, with a checkpoint" in ended.log
    (state,) = run_dir.glob("artifacts/train/*.partial/checkpoint/state.json")
    assert json.loads(state.read_text())["progress"]["step"] == 3
    what = lost(undisturbed, run_dir, tmp_path / "scratch", ended, 143, alone("train").work)
    tally("first SIGTERM: a checkpoint, code 143", not what, what)


def test_the_second_sigterm_ends_training_at_once(
    undisturbed: Undisturbed, alone: Callable[[str], Ended], tmp_path: Path, tally: Tally
) -> None:
    run_dir, event = undisturbed.copy_without("train", tmp_path / "runs"), after_the_first_step(alone("train").events)
    ended = faults_run.run(undisturbed.folder, run_dir, tmp_path / "scratch", Fault(signal.SIGTERM, event, twice=True))
    assert "with a checkpoint" not in ended.log and not list(run_dir.glob("artifacts/train/*.partial/checkpoint"))
    what = lost(undisturbed, run_dir, tmp_path / "scratch", ended, 143, alone("train").work)
    tally("second SIGTERM: ends at once", not what, what)
