"""A canary for every secret that an environment may hold: it reaches who must have it, and is in nothing that a run leaves."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import experiment
import pytest
import yaml

from pipeline import tracked
from pipeline.doctor import _ask, _Server
from pipeline.tracking import MLflowTracker, RunFacts

ROOT = Path(__file__).resolve().parents[2]


def canary(name: str) -> str:
    """Text that occurs nowhere else, and survives in a URL as it is."""
    return f"canary-{name}-7f3a91c4d2e8"


def forms(secret: str) -> list[bytes]:
    """As it could be written down: as it is, quoted for a URL, in UTF-16, and in base64 at any offset."""
    found = {secret.encode(), quote(secret, safe="").encode(), secret.encode("utf-16-le")}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + secret.encode())
        found.add(encoded[4 if shift else 0 : -4])
    return sorted(found)


def leaks(folder: Path, secrets: dict[str, str]) -> list[str]:
    """Files under a folder, and names of files, in which a secret is."""
    found = []
    for path in folder.rglob("*"):
        content = os.fsencode(path) + (path.read_bytes() if path.is_file() else b"")
        found += [f"{name} in {path}" for name, secret in secrets.items() if any(form in content for form in forms(secret))]
    return found


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    secret = canary("x")
    for number, content in enumerate(
        [b"\0\0" + secret.encode(), base64.b64encode(b"user:" + secret.encode()), secret.encode("utf-16-le"), b"nothing"]
    ):
        (tmp_path / f"{number}.bin").write_bytes(content)
    (tmp_path / secret).mkdir()
    assert len(leaks(tmp_path, {"x": secret})) == 4


class Judge(BaseHTTPRequestHandler):
    """An endpoint that is content with every answer."""

    keys: set[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.add(str(self.headers["Authorization"]))
        reply = {"choices": [{"message": {"content": "Fine. Rating: [[5]]"}}], "usage": {"total_tokens": 9}}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[tuple[str, set[str]]]:
    """Address, and the keys that were sent there."""
    keys: set[str] = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Judge,), {"keys": keys}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", keys
    server.shutdown()
    server.server_close()


def test_a_run_leaves_no_secret_of_its_environment(tmp_path: Path, judge: tuple[str, set[str]]) -> None:
    """The whole command: artifacts, report, MLflow's database and files, Prefect's database and logs, the terminal."""
    secrets = {
        name: canary(name.lower().replace("_", "-"))
        for name in (
            "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_KEY", "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN", "JUDGE_KEY", "PREFECT_API_AUTH_STRING",
        )
    }  # fmt: skip
    store = {"store-user": canary("store-user"), "store-password": canary("store-password"), "store-query": canary("query")}
    address = f"memory://{store['store-user']}:{store['store-password']}@bucket/prefix?token={store['store-query']}"
    path = experiment.write(tmp_path / "input")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["methods"] = {"kd": None}
    content["benchmarks"].pop("tasks")
    content["train"] |= {"max_steps": 2, "seeds": [10]}
    metrics = {"judge": {"base_url": judge[0], "model": "m", "max_requests": 99, "api_key_variable": "JUDGE_KEY"}}
    content["evaluation"] |= {"seeds": [1], "metrics": metrics}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_", "DISTILLLENS_"))}
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "reproduce", str(path)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "runs")],
        cwd=tmp_path, capture_output=True, timeout=280, check=False,
        env={**kept, **secrets, "DISTILLLENS_STORE": address, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert judge[1] == {f"Bearer {secrets['JUDGE_KEY']}"}
    (tmp_path / "terminal.txt").write_bytes(done.stdout + done.stderr)
    for part in ("runs/mlflow.db", "runs/mlartifacts", "runs/.prefect", "runs/tiny/comparison/report.html", "runs/artifacts"):
        assert (tmp_path / part).exists(), part
    assert not leaks(tmp_path, {**secrets, **store})


def test_a_tracking_servers_password_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The address of a server that fails is in the errors of MLflow's client, and in what the run directory remembers."""
    secrets = {"user": canary("user"), "password": canary("password")}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{secrets['user']}:{secrets['password']}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    caplog.set_level(logging.DEBUG, logger="pipeline")
    tracker = MLflowTracker(tmp_path, "e")
    tracker.start(RunFacts("key", "name", "e", {}, {}))
    tracker.log_metrics("key", {"a": 1.0})
    tracker.close(patience=1.0)
    assert "MLflow: " in caplog.text and not tracker.complete

    class Comparison:
        class place:
            fingerprint = "0" * 16

        class experiment:
            name = "e"

    tracked.mark_tracked(Comparison, tmp_path)  # type: ignore[arg-type]
    (tmp_path / "terminal.txt").write_text(caplog.text)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) >= 3
    assert not leaks(tmp_path, secrets)


@pytest.mark.parametrize("address", ["http://user:{}@127.0.0.1:9/health", "http://user:{}@127.0.0.1/health", "http://{}@[/"])
def test_the_doctor_shows_no_password(address: str) -> None:
    finding = _ask(_Server("MLflow", address.format(canary("doctor")), "GET", "note", "start it"))
    assert finding.status == "note" and canary("doctor") not in f"{finding.found} {finding.advice}"
