"""Flows that are carried out with and without the Prefect API: the body runs once, and what it came to is what counts."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from pipeline.errors import DataError


@pytest.fixture(autouse=True)
def _impatient(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from flows import outage

    for name in ("_START_SECONDS", "_END_SECONDS"):
        monkeypatch.setattr(outage, name, 0.0)
    yield
    outage._lost.clear()


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on no call of the API succeeds."""
    import httpx

    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise httpx.ConnectError("refused")

    def leave() -> None:
        monkeypatch.setattr("prefect.client.base.PrefectHttpxSyncClient.send", refuse)

    return leave


def carried_out(body: Callable[[int], Any]) -> Any:
    from prefect import flow

    from flows.outage import carry_out

    return carry_out(flow(name="carried", validate_parameters=False)(body), {"number": 3})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "flows.outage" and r.levelno == logging.WARNING]


def test_with_the_api_the_flow_runs_under_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    from prefect.runtime import flow_run

    seen: list[Any] = []

    def body(number: int) -> int:
        seen.append(flow_run.id)
        return number + 1

    assert carried_out(body) == 4
    assert len(seen) == 1 and seen[0] is not None and not warnings(caplog)


def test_without_the_api_the_body_runs_alone(away: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    from prefect import task
    from prefect.runtime import flow_run
    from prefect.task_runners import ThreadPoolTaskRunner

    seen: list[Any] = []
    increased = task(lambda number: number + 1, name="increased")

    def body(number: int) -> int:
        seen.append(flow_run.id)
        with ThreadPoolTaskRunner() as runner:  # as sweeps do it
            return increased(number) + runner.submit(increased, {"number": number}).result()

    away()
    assert carried_out(body) == 8
    (warning,) = warnings(caplog)
    assert seen == [None] and warning.startswith("Prefect does not record this run (API at ") and "refused" in warning


def test_an_api_lost_in_between_costs_one_warning(away: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    ran: list[int] = []

    def body(number: int) -> int:
        ran.append(number)
        away()
        return number + 1

    assert carried_out(body) == 4 and ran == [3]
    (warning,) = warnings(caplog)
    assert warning.startswith("Prefect did not record how the run ended (API at ") and "refused" in warning
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("error", [DataError("train.jsonl: no rows"), KeyboardInterrupt(), SystemExit(143), ValueError("bug")])
@pytest.mark.parametrize("lost", [False, True])
def test_what_the_body_raises_is_what_the_caller_gets(error: BaseException, lost: bool, away: Callable[[], None]) -> None:
    def body(number: int) -> int:
        if lost:
            away()
        raise error

    with pytest.raises(type(error)) as raised:
        carried_out(body)
    assert raised.value is error


def test_an_error_of_http_in_the_body_is_the_bodys(caplog: pytest.LogCaptureFixture) -> None:
    import httpx

    error = httpx.ConnectError("of something else")

    def body(number: int) -> int:
        raise error

    with pytest.raises(httpx.ConnectError) as raised:
        carried_out(body)
    assert raised.value is error and not warnings(caplog)


def test_a_request_to_end_ends_the_process_as_ever(away: Callable[[], None]) -> None:
    from prefect.exceptions import TerminationSignal

    def body(number: int) -> int:
        away()
        raise TerminationSignal(signal=15)

    with pytest.raises(SystemExit) as raised:
        carried_out(body)
    assert raised.value.code == 143


def test_the_loss_of_the_last_call_is_found_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import httpx

    def body(number: int) -> int:
        def refuse(*_: Any, **__: Any) -> Any:
            raise httpx.ReadTimeout("late")

        monkeypatch.setattr("prefect.flow_engine.propose_state_sync", refuse)
        return number + 1

    assert carried_out(body) == 4
    (warning,) = warnings(caplog)
    assert "how the run ended" in warning and "ReadTimeout: late" in warning


def test_pages_come_after_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.runtime import flow_run

    from tasks import pages

    taken: list[tuple[str, Any]] = []
    here = [False]

    def create(markdown: str, key: str, description: str | None) -> None:
        if not here[0]:
            raise ConnectionError("away")
        taken.append((key, flow_run.id))

    monkeypatch.setattr(pages, "create_markdown_artifact", create)

    def body(number: int) -> tuple[Any, int]:
        for index in range(number):
            pages.show_page(f"page-{index}", None, "text")
        assert pages.deliver(10.0) == number  # refused, and once more: given up
        for index in range(number):
            pages.show_page(f"page-{index}", None, "text")
        with pages._waiting.all_tasks_done:
            pages._waiting.all_tasks_done.wait_for(lambda: not pages._waiting.unfinished_tasks, 10.0)
        here[0] = True
        return flow_run.id, pages.deliver(10.0)

    run, left = carried_out(body)
    assert left == 0 and sorted(taken) == [(f"page-{index}", run) for index in range(3)]


def test_pages_without_a_flow_run_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import pages

    monkeypatch.setattr(pages, "create_markdown_artifact", None)
    pages.show_page("page", None, "text")
    assert pages.deliver(0.0) == 0


def test_a_page_that_is_never_taken_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import pages

    gate = threading.Event()
    monkeypatch.setattr(pages, "create_markdown_artifact", lambda **_: gate.wait())

    def body(number: int) -> int:
        for index in range(number):
            pages.show_page(f"page-{index}", None, "text")
        return pages.deliver(0.0)

    try:
        assert carried_out(body) == 3
    finally:
        gate.set()


def test_slow_pages_are_waited_for_while_one_comes_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import pages

    monkeypatch.setattr(pages, "create_markdown_artifact", lambda **_: time.sleep(0.6))

    def body(number: int) -> int:
        for index in range(number):
            pages.show_page(f"page-{index}", None, "text")
        return pages.deliver(1.5)

    assert carried_out(body) == 0


@pytest.mark.parametrize(("recorded", "problem"), [(4, None), (3, "not recorded after 15 s")])
def test_a_server_that_records_slowly_is_waited_for(
    recorded: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import outage

    clock, asked = [0.0], [0]
    ended = SimpleNamespace(state=SimpleNamespace(is_final=lambda: True))

    class Client:
        def read_task_runs(self, **_: Any) -> list[Any]:
            asked[0] += 1
            return [ended] * min(asked[0], recorded)

    def sleep(seconds: float) -> None:
        clock[0] += 10.0

    monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(outage, "_impatient_client", lambda: contextlib.nullcontext(Client()))
    assert outage._unrecorded_tasks(uuid4(), 4) == problem


def test_a_trial_elsewhere_outlives_the_loss_of_the_api(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import httpx

    from tasks import trial

    monkeypatch.setattr(trial, "_POLL_SECONDS", 0.0)
    trial.let_trials_run()
    request = httpx.Request("GET", "http://api")
    answers: list[Any] = [
        httpx.ConnectError("refused"), httpx.HTTPStatusError("500", request=request, response=httpx.Response(500)), "state",
    ]  # fmt: skip

    def call() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert trial._patiently("kd s10", call) == "state"
    assert [r.getMessage() for r in caplog.records] == [
        "kd s10: the Prefect API does not answer (refused); the trial goes on, and is asked for later"
    ]


@pytest.mark.parametrize(
    ("limit", "message"), [(-1.0, "kd s10: the Prefect API has not answered for"), (9.0, "kd s10: stopped")]
)
def test_a_trial_elsewhere_is_given_up_in_the_end(limit: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from tasks import trial

    monkeypatch.setattr(trial, "_AWAY_SECONDS", limit)
    trial.stop_trials()

    def call() -> Any:
        raise httpx.ConnectError("refused")

    try:
        with pytest.raises(trial.TrialFailed, match=message):
            trial._patiently("kd s10", call)
    finally:
        trial.let_trials_run()


def test_a_refusal_of_the_api_is_not_waited_for() -> None:
    import httpx

    from tasks import trial

    def call() -> Any:
        raise httpx.HTTPStatusError("404", request=httpx.Request("GET", "http://api"), response=httpx.Response(404))

    with pytest.raises(httpx.HTTPStatusError):
        trial._patiently("kd s10", call)


def test_the_service_waits_for_an_api_that_is_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    import httpx
    from prefect.runner._scheduled_run_poller import ScheduledRunPoller

    from flows import serve

    request = httpx.Request("POST", "http://api")
    errors: list[Exception | None] = [
        *(httpx.HTTPStatusError("failed", request=request, response=httpx.Response(500)) for _ in range(3)), None,
        httpx.ConnectError("refused"), httpx.HTTPStatusError("no", request=request, response=httpx.Response(403)),
    ]  # fmt: skip

    async def poll(self: Any, task_group: Any) -> None:
        error = errors.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(ScheduledRunPoller, "_get_and_submit_flow_runs", poll)
    serve._outlast_outages()
    patiently: Any = ScheduledRunPoller._get_and_submit_flow_runs
    for _ in range(5):
        asyncio.run(patiently(None))
    with pytest.raises(httpx.HTTPStatusError, match="no"):
        asyncio.run(patiently(None))
    assert [record.getMessage().partition("(")[2].partition(")")[0] for record in caplog.records] == ["failed", "refused"]


# Our own server


def test_a_server_of_ours_that_does_not_start_is_one_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows import engine

    begin = engine.server_process

    def broken(command: Any, *given: Any) -> Any:
        return begin([sys.executable, "-c", "raise SystemExit(3)"], *given)

    monkeypatch.setattr(engine, "users_server", lambda: None)
    monkeypatch.setattr(engine, "server_process", broken)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    caplog.set_level(logging.INFO)
    with engine.engine(tmp_path):
        assert os.environ["PREFECT_API_URL"].startswith("http://127.0.0.1:")
    assert "PREFECT_API_URL" not in os.environ and "the Prefect server did not start; it says why in" in caplog.text


@pytest.mark.parametrize(
    ("healthy", "deaths", "starts"), [(True, 1, 2), (True, 9, 4), (False, 9, 1)], ids=["once", "always", "never answered"]
)
def test_a_server_of_ours_that_dies_is_started_again(healthy: bool, deaths: int, starts: int) -> None:
    from flows import engine
    from pipeline.processes import Outcome

    stop, answered, seen = threading.Event(), threading.Event(), []
    if healthy:
        answered.set()

    def start() -> Outcome:
        seen.append(1)
        if len(seen) > deaths:
            stop.set()
        return Outcome(-9, 1.0, timed_out=False, stopped=stop.is_set())

    engine._keep_running(start, answered, stop)
    assert len(seen) == starts


@pytest.mark.parametrize(("error", "kept"), [(DataError("train.jsonl: no rows"), False), (ValueError("bug"), True)])
def test_an_expected_failure_is_logged_without_a_traceback(error: Exception, kept: bool) -> None:
    from flows import outage

    record = logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, "failed", None, (type(error), error, None))
    with outage._quiet():
        assert logging.getLogger("prefect.task_runs").filter(record) and bool(record.exc_info) is kept
