"""Progress for people: bars with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

log = logging.getLogger(__name__)
_LINE_SECONDS = 15.0


class Advance(Protocol):
    """Says that `amount` more units are done; `note` replaces the text at the end of the bar."""

    def __call__(self, amount: float, note: str = "") -> None:
        """Advance."""
        ...


@contextlib.contextmanager
def progress(description: str, total: float, unit: str, done: float = 0.0) -> Iterator[Advance]:
    """Show progress on a piece of work of `total` units, of which `done` were done before."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(description, total, unit, done) as advance:
        yield advance


@contextlib.contextmanager
def _bar(description: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(description, total=total, completed=int(done), rate="", note="")

        def advance(amount: float, note: str = "") -> None:
            bars.update(bar, advance=amount, note=note)
            speed = bars.tasks[0].speed
            if speed:
                bars.update(bar, rate=f"{speed:.3g}/s")

        yield advance


@contextlib.contextmanager
def _lines(description: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    started = told = time.monotonic()
    before = done

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, told
        done += amount
        now = time.monotonic()
        if now - told >= _LINE_SECONDS:
            told = now
            rate = (done - before) / (now - started)
            left = (total - done) / rate if rate else 0.0
            log.info(
                "%s: %g of %g %s, %.3g/s, %.0f s left%s",
                description,
                done,
                total,
                unit,
                rate,
                left,
                f" · {note}" if note else "",
            )

    yield advance
    log.info("%s: %g %s in %.1f s", description, done, unit, time.monotonic() - started)
