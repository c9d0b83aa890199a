"""Pages in the Prefect UI, sent by a thread of their own: the work does not wait for the API, nor fail with it."""

from __future__ import annotations

import contextvars
import functools
import queue
import threading
from collections.abc import Callable

from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

_waiting: queue.Queue[Callable[[], object]] = queue.Queue()
_refused: list[Callable[[], object]] = []
_starting = threading.Lock()


def show_page(key: str, description: str | None, markdown: str) -> None:
    """Leave a page for the flow run and task run that this is called in; without a flow run there is no place for one.

    Args:
        key: lower-case letters, digits and dashes.
        description: a line above it.
        markdown: its text.
    """
    if FlowRunContext.get() is None:
        return
    context = contextvars.copy_context()
    _waiting.put(functools.partial(context.run, create_markdown_artifact, markdown=markdown, key=key, description=description))
    with _starting:
        if not any(thread.name == _send.__name__ for thread in threading.enumerate()):
            threading.Thread(target=_send, name=_send.__name__, daemon=True).start()


def deliver(seconds: float) -> int:
    """Wait for the pages to be sent, once more those that the API did not take; returns how many are given up.

    Args:
        seconds: how long to wait while none is sent.
    """
    for page in _taken(_refused):
        _waiting.put(page)
    with _waiting.all_tasks_done:
        left, before = _waiting.unfinished_tasks, None
        while left and left != before:
            _waiting.all_tasks_done.wait_for(lambda: not _waiting.unfinished_tasks, seconds)
            left, before = _waiting.unfinished_tasks, left
    while not _waiting.empty():
        _waiting.get_nowait()
        _waiting.task_done()
    return left + len(_taken(_refused))


def _taken(pages: list[Callable[[], object]]) -> list[Callable[[], object]]:
    taken, pages[:] = pages[:], []
    return taken


def _send() -> None:
    while True:
        page = _waiting.get()
        try:
            page()
        except Exception:  # whatever it is that the client raises: the page is counted, and told about at the end
            _refused.append(page)
        finally:
            _waiting.task_done()
