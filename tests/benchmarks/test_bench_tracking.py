"""What a tracking server that is away, broken or slow costs a training: its time over that without a tracker, in pairs."""

from __future__ import annotations

import shutil
import socket
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
from conftest import Figures

from pipeline.plan import Plan
from pipeline.tracking import MLflowTracker, NoTracker, RunFacts, Tracker, tracker
from pipeline.trial import train_tracked

GROUP = "tracking: time of a training over that without a tracker"
PAIRS, STEPS = 7, 120
SLOW_SECONDS = 2.0


def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> ThreadingHTTPServer:
    """A server that answers every call in one way."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if self.raw_requestline and self.parse_request():
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer(self)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def slow(handler: BaseHTTPRequestHandler) -> None:
    """Two seconds, then what MLflow answers to most calls; enough for metrics to be sent all the time."""
    time.sleep(SLOW_SECONDS)
    run = '{"info": {"run_id": "0123456789abcdef0123456789abcdef", "status": "RUNNING"}, "data": {}}'
    content = f'{{"experiment": {{"experiment_id": "1", "name": "e"}}, "run": {run}, "runs": [{run}]}}'.encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def broken(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(500)


@pytest.fixture(params=["slow, 2 s a call", "dead", "answering 500"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """What it does, and its address."""
    if request.param == "dead":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            yield request.param, f"http://127.0.0.1:{probe.getsockname()[1]}"
        return
    made = serve(slow if request.param.startswith("slow") else broken)
    yield request.param, f"http://127.0.0.1:{made.server_port}"
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


@pytest.mark.timeout(3600)
def test_training_beside_a_server(
    benchmark: Any, figures: Figures, plan: Plan, server: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, address = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 0.0)

    def tracked(number: int) -> float:
        with MLflowTracker(tmp_path / str(number), "e") as told:
            taken = seconds(plan, told, tmp_path / "artifact")
        told._delivery.join()  # a call that is under way
        return taken

    def pair(number: int) -> float:
        # Either first, in turn: the machine may become slower or faster meanwhile.
        if number % 2:
            without = seconds(plan, NoTracker(), tmp_path / "artifact")
            return tracked(number) / without
        beside = tracked(number)
        return beside / seconds(plan, NoTracker(), tmp_path / "artifact")

    pair(-1)
    ratios = benchmark.pedantic(lambda: [pair(number) for number in range(PAIRS)], rounds=1)
    figures.add(GROUP, f"server {name}: median of {PAIRS} pairs", statistics.median(ratios), "×", ("<=", 1.02))
    figures.add(GROUP, f"server {name}: spread of the pairs", max(ratios) - min(ratios), "×")
