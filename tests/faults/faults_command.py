"""The command itself, in a process with all libraries imported."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faults_run


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
