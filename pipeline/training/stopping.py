"""Stopping on SIGTERM: the step that computes is finished and saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.errors import PipelineError

StopAsked = Callable[[], bool]
"""Whether the process has been asked to stop."""


class Stopped(PipelineError):
    """Training stopped because it was asked to; a checkpoint is written, so the same command goes on from there."""

    exit_code = 128 + signal.SIGTERM


def never() -> bool:
    """A `StopAsked` for training that nobody stops."""
    return False


class _Flag:
    """A flag for signal handlers. No Event: a handler that interrupts itself would wait for the Event's lock for ever."""

    def __init__(self) -> None:
        self.raised = False

    def __call__(self) -> bool:
        return self.raised


def note_every_sigterm() -> StopAsked:
    """Note SIGTERM and SIGINT for the rest of the process's life, as often as they come.

    For processes whose parent ends them: a signal to a whole group of processes reaches them twice, through it and directly.
    """
    asked = _Flag()

    def note(_: int, __: FrameType | None) -> None:
        asked.raised = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return asked


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopAsked]:
    """Note the first SIGTERM instead of dying of it; the second does what one did before, which by default ends the process.

    Python gives signals to the main thread alone, so in any other this does nothing, and the first SIGTERM ends the process.
    """
    asked = _Flag()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGTERM)
    before = signal.SIG_DFL if before is None else before  # None: installed by something else than Python

    def note(_: int, __: FrameType | None) -> None:
        asked.raised = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
