"""What tracking and the engine cost a training while their servers are well, away, broken, silent or slow.

Two measures: its time over that without them, in pairs, and the share of it that goes into them at most (`burden`). The
first cannot tell 2 % from nothing where two trainings without either differ by more, which is measured too.
"""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
from burden import OtherThreads, Timed
from conftest import Figures
from prefect_process import prefect_server
from proxy import NOBODY, Mode, Proxy

from flows.engine import configure_prefect
from pipeline.plan import Plan
from pipeline.tracking import MLflowTracker, NoTracker, RunFacts, Tracker, tracker
from pipeline.trial import train_tracked

GROUP = "services: what they cost a training"
PAIRS, STEPS = 3, 30
GOAL = ("<=", 2.0)
SLOW_SECONDS = 2.0


class Slow(BaseHTTPRequestHandler):
    """Two seconds, then what MLflow answers to most calls; enough for metrics to be sent all the time."""

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if self.raw_requestline and self.parse_request():
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()
        self.close_connection = True

    def answer(self) -> None:
        time.sleep(SLOW_SECONDS)
        run = '{"info": {"run_id": "0123456789abcdef0123456789abcdef", "status": "RUNNING"}, "data": {}}'
        content = f'{{"experiment": {{"experiment_id": "1", "name": "e"}}, "run": {run}, "runs": [{run}]}}'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=["slow", "gone", "silent", "broken"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """What it does, and its address."""
    if request.param != "slow":
        yield request.param, f"http://127.0.0.1:{Proxy(NOBODY, request.param).port}"
        return
    made = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"slow, {SLOW_SECONDS:g} s a call", f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A training of some seconds, with a metric record for every step."""
    folder = tmp_path_factory.mktemp("tracking")
    tiny.save(tiny.llama(layers=6, width=256), folder / "teacher")
    budget = {"max_steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": STEPS, "seeds": [10]}
    rows = {"train": tiny.write_rows(folder / "train.jsonl", 24), "dev": tiny.write_rows(folder / "dev.jsonl", 6, seed=1)}
    for name in ("general", "tasks"):
        tiny.write_rows(folder / f"{name}.jsonl", 4, seed=2)
    made = stages.planned(
        folder, methods={"kd": None}, train=budget, validation={"select": "loss", "every_steps": STEPS},
        data={name: {"path": str(path)} for name, path in rows.items()},
    )  # fmt: skip
    return stages.run_inputs(made)


def seconds(plan: Plan, told: Tracker, folder: Path) -> float:
    """Of one training, anew, with everything that it tells."""
    made = stages.training(plan, "kd")
    shutil.rmtree(folder, ignore_errors=True)
    made = replace(made, place=replace(made.place, path=folder / made.place.fingerprint))
    started = time.perf_counter()
    run = told.start(RunFacts("key", "kd", "e", {"a": 1}, {}))
    train_tracked(made, run, told)
    told.finish(run, "FINISHED")
    return time.perf_counter() - started


def pairs(one: Callable[[int], float], other: Callable[[int], float]) -> list[float]:
    """Time of one over that of the other; the first pair is not counted."""

    def pair(number: int) -> float:
        # Either first, in turn: the machine may become slower or faster meanwhile.
        if number % 2:
            without = other(number)
            return one(number) / without
        beside = one(number)
        return beside / other(number)

    return [pair(number) for number in range(PAIRS + 1)][1:]


@pytest.fixture
def alone(plan: Plan, tmp_path: Path) -> Callable[[int], float]:
    """Seconds of a training without either."""
    return lambda number: seconds(plan, NoTracker(), tmp_path / "alone")


@pytest.mark.timeout(3600)
def test_nothing_beside_it(benchmark: Any, figures: Figures, alone: Callable[[int], float]) -> None:
    """What the ratio is where there is nothing to measure: the machine's noise."""
    ratios = benchmark.pedantic(lambda: pairs(alone, alone), rounds=1)
    figures.add(GROUP, f"time, nothing beside it: median of {PAIRS} pairs", statistics.median(ratios), "×")
    figures.add(GROUP, "time, nothing beside it: spread of the pairs", max(ratios) - min(ratios), "×")


def note(figures: Figures, name: str, ratios: list[float], shares: list[float]) -> None:
    """Both measures of one service in one state."""
    figures.add(GROUP, f"time, {name}: median of {PAIRS} pairs", statistics.median(ratios), "×")
    figures.add(GROUP, f"share, {name}: median of {PAIRS}", 100 * statistics.median(shares[1:]), "%", GOAL)


@pytest.mark.timeout(3600)
def test_training_beside_mlflow(
    benchmark: Any, figures: Figures, plan: Plan, alone: Callable[[int], float], server: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name, address = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 0.0)
    shares: list[float] = []

    def tracked(number: int) -> float:
        with MLflowTracker(tmp_path / str(number), "e") as told:
            timed: Any = Timed(told)
            with OtherThreads() as others:
                taken = seconds(plan, timed, tmp_path / "artifact")
        shares.append((timed.seconds + others.seconds) / taken)
        told._delivery.join()  # a call that is under way
        return taken

    note(figures, f"MLflow {name}", benchmark.pedantic(lambda: pairs(tracked, alone), rounds=1), shares)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a Prefect server."""
    home = tmp_path_factory.mktemp("prefect")
    configure_prefect(home)
    with prefect_server(home / "server") as port:
        yield port


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["pass", "gone", "silent", "broken", "slow"])
def test_training_beside_prefect(
    benchmark: Any, figures: Figures, plan: Plan, alone: Callable[[int], float], api: int, mode: Mode, tmp_path: Path
) -> None:
    from prefect import flow, task
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.outage import carry_out

    shares: list[float] = []

    def engaged(number: int) -> float:
        proxy = Proxy(api, delay=SLOW_SECONDS)

        @task(name="trained")
        def trained() -> float:
            proxy.set(mode)
            with OtherThreads() as others:
                taken = seconds(plan, NoTracker(), tmp_path / "artifact")
            proxy.set("pass")
            shares.append(others.seconds / taken)
            return taken

        @flow(name="training")
        def body() -> float:
            return trained()

        with temporary_settings({PREFECT_API_URL: proxy.address}):
            return carry_out(body, {})

    name = {"pass": "there", "slow": f"slow, {SLOW_SECONDS:g} s a call"}.get(mode, mode)
    note(figures, f"Prefect API {name}", benchmark.pedantic(lambda: pairs(engaged, alone), rounds=1), shares)
