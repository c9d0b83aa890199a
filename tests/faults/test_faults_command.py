"""The same by the command itself, with engine and tracker: killed while it trains, and called twice at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults_setup import ALL, Tally, Undisturbed

ROOT = Path(__file__).resolve().parents[2]
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
pytestmark = [pytest.mark.skipif(not ALL, reason="starts the whole program; `make faults`"), pytest.mark.timeout(600)]


def start(undisturbed: Undisturbed, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "reproduce", str(undisturbed.folder / "experiment.yaml")]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    log = run_dir.with_suffix(".log").open("ab")
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)], cwd=ROOT, env={**given, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
    )


def said(run_dir: Path) -> str:
    return run_dir.with_suffix(".log").read_text()


def numbers(run_dir: Path) -> bytes:
    return (run_dir / "tiny" / "comparison" / "results.csv").read_bytes()


@pytest.mark.parametrize("number", list(CODES), ids=[number.name for number in CODES])
def test_killed_while_it_trains(number: signal.Signals, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    run_dir = tmp_path / "runs"
    process = start(undisturbed, run_dir)
    while process.poll() is None and not list(run_dir.glob("artifacts/train/*.partial/checkpoint/state.json")):
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(10)
    again = start(undisturbed, run_dir).wait(300)
    log = said(run_dir)
    good = code == CODES[number] and again == 0 and numbers(run_dir) == numbers(undisturbed.run_dir) and "Traceback" not in log
    tally(f"{number.name} to the command", good, f"{code}, {again}: {log}")


def test_two_at_once(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    run_dir = tmp_path / "runs"
    processes = [start(undisturbed, run_dir) for _ in range(2)]
    codes = sorted(process.wait(400) for process in processes)
    log = said(run_dir)
    good = codes[0] == 0 and codes[1] in (0, 2) and numbers(run_dir) == numbers(undisturbed.run_dir) and "Traceback" not in log
    tally("two commands in one directory", good, f"{codes}: {log}")
