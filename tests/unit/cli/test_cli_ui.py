"""`distilllens ui`: what it opens on, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.leaderboard import FINISHED, VIEW_TAG

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 120


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "ui", *arguments]


def environment(**env: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    return {**own, "PYTHONPATH": str(ROOT), **env}


def ui(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(**env), capture_output=True, text=True, timeout=TIMEOUT)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == "", done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose store has a compared experiment and a newer one that is not compared."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("ui") / "runs"
    folder.mkdir()
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.create_experiment("compared", tags={FINISHED: "100", VIEW_TAG: "{}"})
    client.create_experiment("running")
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_line(*arguments: str) -> str:
    """What is printed before the server starts, which is not waited for."""
    with subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            return server.stdout.readline()
        finally:
            server.kill()


def test_it_prints_where_the_leaderboard_is_in_the_mode_for_trained_models(run_dir: Path, free_port: int) -> None:
    assert first_line("--run-dir", str(run_dir), "--port", str(free_port)) == (
        f"MLflow UI, compared: http://127.0.0.1:{free_port}/#/experiments/1/runs"
        "?workflowType=machine_learning&viewStateShareKey=leaderboard (Ctrl-C ends it)\n"
    )


def test_it_opens_on_the_experiment_that_is_asked_for(run_dir: Path, free_port: int) -> None:
    said = first_line("--run-dir", str(run_dir), "--port", str(free_port), "--experiment", "running")
    assert said.startswith("MLflow UI, running: ") and "/#/experiments/2/runs?workflowType=machine_learning (" in said


def test_an_unknown_experiment_is_refused_with_those_that_are_known(run_dir: Path) -> None:
    said = refused(ui("--run-dir", str(run_dir), "--experiment", "missing"))
    assert "--experiment: 'missing' is not in this store" in said and "compared" in said and "running" in said


def test_a_port_in_use_is_refused(run_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port: {port} cannot be used" in refused(ui("--run-dir", str(run_dir), "--port", str(port)))


def test_a_run_directory_without_a_store_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    assert "has no mlflow.db; run `distilllens reproduce CONFIG" in refused(ui("--run-dir", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


class _Experiments(BaseHTTPRequestHandler):
    """As much of a tracking server as is asked for."""

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"experiments": [{"experiment_id": "7", "name": "shared", "tags": [{"key": VIEW_TAG, "value": "{}"}]}]})

    def do_GET(self) -> None:  # noqa: N802
        self._answer({})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Experiments) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_server_that_is_there_is_named_and_none_is_started(server: str, tmp_path: Path) -> None:
    done = ui("--run-dir", str(tmp_path), MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"MLflow UI, shared: {server}/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=leaderboard\n"
    )
