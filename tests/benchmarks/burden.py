"""What else a process does while it trains: the processor time of its other threads, which take the interpreter from training.

Beside the seconds that training itself spends in calls it bounds how much they slow it: where there is a core for them they
cost less. Unlike the wall time of two trainings it does not depend on what else the machine does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_SAMPLE_SECONDS = 0.1
_NANOSECONDS = 1e9


class OtherThreads:
    """Counts processor seconds of the Python threads that are not the caller's, in a `with` statement.

    They are looked at often, since a thread takes its count with it when it ends.
    """

    def __init__(self, but: Sequence[str] = ("feed",)) -> None:
        """Args:
        but: beginnings of the names of threads that are part of training.
        """
        self._but, self._ended = tuple(but), threading.Event()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    @property
    def seconds(self) -> float:
        """Their processor time inside of the statement."""
        return sum(last - self._first.get(thread, 0.0) for thread, last in self._last.items())

    def __enter__(self) -> OtherThreads:
        self._mine = threading.get_native_id()
        self._first = self._times()
        self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._last |= self._times()
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._last |= self._times()

    def _times(self) -> dict[int, float]:
        others = [t.native_id for t in threading.enumerate() if t is not self._sampler and not t.name.startswith(self._but)]
        found = {}
        for thread in others:
            if thread is not None and thread != self._mine:
                with contextlib.suppress(OSError):  # it has just ended
                    found[thread] = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / _NANOSECONDS
        return found


class Timed:
    """An object whose methods are timed, and the functions that they return.

    Attributes:
        seconds: spent in its calls.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        return self._timed(getattr(self._inner, name))

    def _timed(self, value: Any) -> Any:
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return self._timed(value(*args, **kwargs))
            finally:
                self.seconds += time.perf_counter() - started

        return call
