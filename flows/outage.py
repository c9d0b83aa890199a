"""Flows whose work goes on without the Prefect API: its loss costs the record of a run, and is told about in one message."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from prefect import Flow, results
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.exceptions import Abort, TerminationSignal
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)

from pipeline.errors import PipelineError
from tasks.pages import deliver

log = logging.getLogger(__name__)
R = TypeVar("R")
_ANSWER_SECONDS = 10.0
_START_SECONDS = 3.0
_END_SECONDS = 20.0
"""Patience at the end of a run: a server of ours that died is back by then."""
_RECORDING_SECONDS = 15.0
"""Patience with a server that records nothing more of a run that has ended."""
_LAST_SECONDS = 3.0
_CHATTY = ("prefect.events.clients", "prefect._internal.concurrency", "EventsWorker", "APILogWorker")
_RUNS = ("prefect.flow_runs", "prefect.task_runs")
_lost: dict[str, str] = {}
"""What was not recorded → why, since it was last told."""


@dataclass
class _Ended:
    """How a flow's body ended: with a value or an error."""

    started: bool = False
    value: Any = None
    error: BaseException | None = None


def carry_out(flow: Flow[..., R], parameters: dict[str, Any]) -> R:
    """Run a flow; where the API cannot be reached, its body alone.

    Nothing in a body waits for the API, so that its loss shows only when the engine proposes the final state. By then it is
    known what the body came to, and that is what the caller gets.

    Args:
        flow: with a synchronous body.
        parameters: of the flow.

    Raises:
        Whatever the flow's body raises.
    """
    reason = trouble(_START_SECONDS)
    if reason is not None:
        return _without_engine(flow, parameters, reason)
    ended = _Ended()
    observed = copy.copy(flow)
    observed.fn = _observed(flow.fn, ended)
    try:
        with _quiet(), temporary_settings({PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False}):
            result: R = observed(**parameters)
            return result
    except (Abort, httpx.HTTPError) as error:
        if not ended.started and isinstance(error, httpx.HTTPError):
            return _without_engine(flow, parameters, _said(error))
        if not ended.started or error is ended.error:
            raise
        _lost["how the run ended"] = _lost.get("how the run ended") or _said(error)
    finally:
        tell()
    if isinstance(ended.error, TerminationSignal):
        raise SystemExit(128 + signal.SIGTERM)
    if ended.error is not None:
        raise ended.error
    value: R = ended.value
    return value


def trouble(patience: float) -> str | None:
    """Why the API does not answer, None where it does; it is asked again until `patience` seconds are over."""
    deadline = time.monotonic() + patience
    while True:
        # Without the client's own attempts, which would take a minute.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), _impatient_client() as client:
            error = client.api_healthcheck()
        if error is None or time.monotonic() >= deadline:
            return None if error is None else _said(error)
        time.sleep(0.5)


def wait_for_recording(flow_run_id: UUID, tasks: int) -> None:
    """Wait until the server has all `tasks` task runs of a flow run in their final state; it records them with a delay."""
    reason = trouble(_END_SECONDS)
    unsent = deliver(0.0 if reason else _RECORDING_SECONDS)
    if unsent:
        _lost[f"{unsent} pages"] = reason or "not taken in time"
    if reason is None:
        reason = _unrecorded_tasks(flow_run_id, tasks)
    if reason is not None:
        _lost["how tasks ended"] = reason


def tell() -> None:
    """One warning about all that was not recorded; what still waits to be sent is given up with it."""
    unsent = deliver(0.0 if _lost else _LAST_SECONDS)  # those of a run that failed have not been waited for
    if unsent:
        _lost[f"{unsent} pages"] = next(iter(_lost.values()), "not taken in time")
    if not _lost:
        return
    why = "; ".join(dict.fromkeys(_lost.values()))
    log.warning("Prefect did not record %s (API at %s: %s); the work itself went on", ", ".join(_lost), _address(), why)
    _lost.clear()
    _stop_sending()


def _observed(function: Callable[..., Any], ended: _Ended) -> Callable[..., Any]:
    """The function, with a note of how it ended.

    A function with plain values in it, since engines copy a flow's body to where its tasks run.
    """

    @functools.wraps(function)
    def body(*args: Any, **kwargs: Any) -> Any:
        ended.started = True
        try:
            ended.value = function(*args, **kwargs)
        except BaseException as error:
            ended.error = error
            _leave_if_away(0.0)
            raise
        _leave_if_away(_END_SECONDS)
        return ended.value

    return body


def _leave_if_away(patience: float) -> None:
    """Leave the engine without another call of the API, each of which would be repeated for a minute."""
    reason = trouble(0.0 if _lost else patience)
    if reason is not None:
        _lost["how the run ended"] = reason
        raise Abort(reason)


def _without_engine(flow: Flow[..., R], parameters: dict[str, Any], reason: str) -> R:
    log.warning("Prefect does not record this run (API at %s: %s); the work itself goes on", _address(), reason)
    changes: dict[Any, Any] = {PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False, PREFECT_LOGGING_TO_API_ENABLED: False}
    EventsWorker.set_client_override(NullEventsClient)
    try:
        with temporary_settings(changes), _local_results():
            return flow.fn(**parameters)
    finally:
        EventsWorker.set_client_override(None)


@contextlib.contextmanager
def _local_results() -> Iterator[None]:
    """Outside of a flow every task asks the API twice where results go: seconds if it refuses, minutes if it is silent."""
    asks = results._read_server_default_result_storage_block_id
    results._read_server_default_result_storage_block_id = lambda: None
    try:
        yield
    finally:
        results._read_server_default_result_storage_block_id = asks


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One message of ours instead of one for everything that Prefect cannot send."""
    for name in _CHATTY:  # for good: they go on while the process ends
        logging.getLogger(name).addFilter(_nothing)
    for name in _RUNS:
        logging.getLogger(name).addFilter(_without_traceback)
    raises, logging.raiseExceptions = logging.raiseExceptions, False  # else Prefect's log handler writes to stderr itself
    try:
        yield
    finally:
        logging.raiseExceptions = raises


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _without_traceback(record: logging.LogRecord) -> bool:
    """Prefect logs every failure with its traceback; an expected one is a message."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True


def _stop_sending() -> None:
    """Prefect's services would try each waiting event and log many times, and the process would not end before that."""
    for service in list(EventsWorker._instances.values()):  # type: ignore[misc]
        if service._loop is not None and service._task is not None:
            service._loop.call_soon_threadsafe(service._task.cancel)


def _unrecorded_tasks(flow_run_id: UUID, tasks: int) -> str | None:
    """Why the server has not recorded all task runs, None where it has."""
    final, since, mine = 0, time.monotonic(), FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), _impatient_client() as client:
        while time.monotonic() < since + _RECORDING_SECONDS:
            try:
                runs = client.read_task_runs(flow_run_filter=mine, limit=200)
            except httpx.HTTPError as error:
                return _said(error)
            ended = sum(run.state is not None and run.state.is_final() for run in runs)
            if tasks <= len(runs) == ended:
                return None
            if ended != final:
                final, since = ended, time.monotonic()
            time.sleep(0.3)
    return f"not recorded after {_RECORDING_SECONDS:.0f} s"


def _impatient_client() -> Any:
    return get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_SECONDS})


def _said(error: BaseException) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP status {error.response.status_code}"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _address() -> str:
    """Host and port of the API, without a password."""
    parts = urlsplit(PREFECT_API_URL.value() or "")
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
