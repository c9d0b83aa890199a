"""Which places made which messages: for a block of code, or as a pytest plugin (`-p messages.recorder`) for whole tests."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from messages.walk import ROOT, Site, sites

from pipeline.errors import ConfigError, PipelineError

FILE = "DISTILLLENS_MESSAGES"
"""Where the plugin writes what it heard."""
Heard = list[tuple[Site, str]]


class _Listener(logging.Handler):
    """Also hears the warnings of the program."""

    def __init__(self, heard: Heard) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def attach(self) -> None:
        """Listen; once more where a library has set up logging anew."""
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        site = _at(record.pathname, record.lineno)
        if site is not None:
            self.heard.append((site, record.getMessage()))


@contextlib.contextmanager
def listening() -> Iterator[_Listener]:
    """Hears every message made meanwhile in this process, with its place."""
    listener = _Listener([])
    heard = listener.heard

    def made(self: PipelineError, *arguments: Any) -> None:
        Exception.__init__(self, *arguments)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.endswith(("pipeline/errors.py", "messages/recorder.py")):
            frame = frame.f_back
        site = _at(frame.f_code.co_filename, frame.f_lineno)
        if site is not None:
            heard.append((site, str(self)))
        # A validator's ValueError reaches the user as one line of this error.
        for problem in self.problems if isinstance(self, ConfigError) else ():
            heard.extend((site, problem) for site in sites() if site.kind == "ValueError" and site.makes(problem))

    PipelineError.__init__ = made  # type: ignore[method-assign]
    listener.attach()
    try:
        yield listener
    finally:
        del PipelineError.__init__  # it has none of its own
        logging.getLogger().removeHandler(listener)


def _at(file: str, line: int) -> Site | None:
    found = Path(file)
    name = str(found.relative_to(ROOT)) if found.is_relative_to(ROOT) else ""
    return next((site for site in sites() if site.file == name and site.lines[0] <= line <= site.lines[1]), None)


# As a plugin

_listener = pytest.StashKey[_Listener]()


def pytest_configure(config: pytest.Config) -> None:
    """Listen during the whole session."""
    if FILE in os.environ:
        stack = contextlib.ExitStack()
        config.stash[_listener] = stack.enter_context(listening())
        config.add_cleanup(stack.close)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Prefect sets up logging when it is imported, and nobody else is told anything after that."""
    if FILE in os.environ:
        item.config.stash[_listener].attach()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write down what this test made the program say."""
    if FILE not in os.environ:
        return
    heard = item.config.stash[_listener].heard
    with open(os.environ[FILE], "a", encoding="utf-8") as stream:
        for site, message in heard:
            stream.write(json.dumps([item.nodeid, site.file, site.where, site.text, message]) + "\n")
    heard.clear()
