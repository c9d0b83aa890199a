"""The command itself, in a process with all libraries imported, and a Prefect server of the user's behind a proxy."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import faults_run

ROOT = Path(__file__).resolve().parents[2]


class Command:
    """`distilllens ARGUMENTS`, begun.

    Attributes:
        process: where it runs.
        output: what it says, both streams.
    """

    def __init__(self, arguments: list[str], run_dir: Path, api: str | None, store: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(store, run_dir / "mlflow.db")
        self._log = run_dir.with_suffix(".log")
        variables = {"PREFECT_API_URL": api} if api else {}
        self.process = faults_run.CONTEXT.Process(
            target=_child, args=([*arguments, "--run-dir", str(run_dir)], self._log, variables)
        )
        self.process.start()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for something that the command does."""
        while not condition():
            assert self.process.is_alive(), self.output
            time.sleep(0.02)

    def wait(self, seconds: float = 250) -> int | None:
        """Its exit code; a process that does not end is killed, with code None."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        return code


def _child(arguments: list[str], log: Path, variables: dict[str, str]) -> None:
    stream = log.open("w", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ.update(variables)
    sys.argv = ["distilllens", *arguments]
    from pipeline.cli import main

    main()


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[int]:
    """A server with its database under `home`; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    given = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    given |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _answers(port):
            assert server.poll() is None
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).status == 200)
    return False
