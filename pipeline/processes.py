"""Work in a process of its own: a log file, a time limit, and no process left behind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 4.0
"""Between the request to stop and the end by force: time for a checkpoint."""
_POLL_SECONDS = 0.1
_PARENT = "DISTILLLENS_PARENT"
_PR_SET_PDEATHSIG = 1
_NUMBERS: dict[type[BaseException], int] = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
"""What signals raise."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal.
        seconds: wall time.
        timed_out: it was stopped at its time limit.
        stopped: it was stopped on request.
    """

    code: int
    seconds: float
    timed_out: bool
    stopped: bool


def run_process(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], time_limit: float | None, stop: threading.Event
) -> Outcome:
    """Run a command in a process group of its own and wait for it; afterwards nothing of the group is left.

    Args:
        arguments: the command.
        log: gets its standard output and error, after what is there.
        environment: variables beside those of this process.
        time_limit: seconds, None for no limit.
        stop: set by another thread to end it early.
    """
    started = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment, _PARENT: str(os.getpid())},
        )  # fmt: skip
    timed_out = stopped = False
    try:
        while process.poll() is None:
            stopped = stop.is_set()
            timed_out = not stopped and time_limit is not None and time.monotonic() - started > time_limit
            if stopped or timed_out:
                _end(process)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
    except BaseException:
        _end(process)
        raise
    finally:
        _signal_group(process, signal.SIGKILL)  # what the process itself left behind
    return Outcome(process.wait(), time.monotonic() - started, timed_out, stopped)


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process by an exception, with exit code 143, so that what it started is ended and closed too.

    Python drops an exception that is raised in a finaliser, which a signal may interrupt like anything else: SIGTERM and Ctrl-C
    are sent again then.
    """
    signal.signal(signal.SIGTERM, _exit)
    sys.unraisablehook = functools.partial(_send_again, sys.unraisablehook)


def die_with_parent() -> None:
    """Let this process be asked to stop when the one that started it by `run_process` dies, however it dies (Linux)."""
    parent = os.environ.get(_PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the request was made
        os.kill(os.getpid(), signal.SIGTERM)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _send_again(otherwise: Callable[[sys.UnraisableHookArgs], object], dropped: sys.UnraisableHookArgs) -> None:
    number = _NUMBERS.get(dropped.exc_type)
    if number is None:
        otherwise(dropped)
        return
    # Later and by another thread: here its exception would be dropped again.
    again = threading.Timer(_POLL_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # The group's id is the leader's, and stays taken as long as any member lives.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
