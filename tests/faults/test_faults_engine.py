"""The command while the Prefect API is away, slow, silent or broken: the same artifacts, exit code 0, at most one warning."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import stages
import yaml
from faults_command import Command
from faults_results import differences, results
from faults_setup import ALL, Tally
from prefect_process import prefect_server
from proxy import NOBODY, Mode, Proxy

from pipeline.stages import compare, evaluate, train
from pipeline.worker import make_inputs

pytestmark = pytest.mark.timeout(600)
only_all = pytest.mark.skipif(not ALL, reason="starts the whole program; `make faults`")
WARNING = ("Prefect did not record ", "Prefect does not record ")
CHANGES: dict[str, Any] = {
    "methods": {"kd": None},
    "train": {"max_steps": 60, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 20, "seeds": [10]},
    "validation": {"select": "loss"},
    "evaluation": {"decoding": {"max_new_tokens": 4}, "seeds": [1]},
}
CHATTER = ("Traceback", "Error logging to API", "| ERROR", "| WARNING", "httpx.", "CRITICAL")


class Calm(NamedTuple):
    """A run without the engine: the experiment's files and its run directory."""

    folder: Path
    run_dir: Path


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """What every run here must come to."""
    folder = tmp_path_factory.mktemp("calm")
    plan = stages.planned(folder, **CHANGES)
    make_inputs(plan)
    for trial in plan.trials:
        if trial.train is not None:
            train.run(trial.train)
        for job in trial.evaluations:
            evaluate.run(job, evaluate.load_subject(job.subject))
    compare.run(plan.comparison)
    return Calm(folder, plan.run_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server that lasts as long as these tests."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as port:
        yield port


def made(run_dir: Path, stage: str) -> Callable[[], list[Path]]:
    """Finished artifacts of a stage, once there are any."""
    return lambda: list((run_dir / "artifacts" / stage).glob("*/manifest.json"))


def steps(run_dir: Path) -> Callable[[], bool]:
    """Whether a training has made a step and still runs."""
    return lambda: any(file.stat().st_size for file in (run_dir / "artifacts").glob("train/*.partial/metrics.jsonl"))


def lost(command: Command, run_dir: Path, calm: Calm, warnings: int, code: int | None = 0) -> str:
    """What is wrong with a run that should have ended like the calm one; empty if nothing is."""
    ended, said = command.wait(), command.output
    found = [] if ended == code else [f"exit code {ended}"]
    found += [f"said {text!r}" for text in CHATTER if text in said]
    told = [line for line in said.splitlines() if line.startswith(WARNING)]
    found += [] if len(told) == warnings else [f"{len(told)} warnings"]
    found += [differences(results(calm.run_dir / "artifacts"), results(run_dir / "artifacts"))]
    tables = [(folder / "tiny" / "comparison" / "results.csv").read_bytes() for folder in (calm.run_dir, run_dir)]
    found += [] if tables[0] == tables[1] and "tiny: ROUGE-L" in said else ["another table"]
    text = "; ".join(each for each in found if each)
    return f"{text}\n{said}" if text else ""


def start(calm: Calm, run_dir: Path, api: str | None, migrated_store: Path) -> Command:
    return Command(["reproduce", str(calm.folder / "experiment.yaml")], run_dir, api, migrated_store)


def recorded(server: int, run_dir: Path) -> dict[str, Any]:
    """What the server knows of the last flow run: its state, its tasks' states, its pages."""
    import httpx

    with httpx.Client(base_url=f"http://127.0.0.1:{server}/api", timeout=30) as client:
        run = client.post("/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 1}).json()[0]
        mine = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        tasks = client.post("/task_runs/filter", json=mine).json()
        pages = client.post("/artifacts/filter", json=mine).json()
    return {"state": run["state_type"], "tasks": [task["state_type"] for task in tasks], "pages": len(pages)}


@only_all
def test_no_stage_waits_for_a_silent_api(server: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally) -> None:
    run_dir, proxy = tmp_path / "runs", Proxy(server)
    command = start(calm, run_dir, proxy.address, migrated_store)
    command.wait_until(made(run_dir, "prepare"))
    proxy.set("silent")
    command.wait_until(lambda: (run_dir / "tiny" / "comparison" / "results.csv").exists())  # never, if anything waited
    calls = proxy.calls
    proxy.set("pass")
    problem = lost(command, run_dir, calm, warnings=0)
    found = recorded(server, run_dir)
    whole = found["state"] == "COMPLETED" and set(found["tasks"]) == {"COMPLETED"} and found["pages"] >= 10
    tally("Prefect API silent, then back", calls > 0 and whole and not problem, f"{calls} calls, {found}; {problem}")


@pytest.mark.parametrize("mode", ["gone", "broken", "silent"] if ALL else ["gone"])
def test_the_api_is_so_from_the_start(mode: Mode, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally) -> None:
    run_dir, proxy = tmp_path / "runs", Proxy(NOBODY, mode)
    command = start(calm, run_dir, proxy.address, migrated_store)
    tally(f"Prefect API {mode} at the start", not (problem := lost(command, run_dir, calm, warnings=1)), problem)


@only_all
def test_the_api_is_slow(server: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally) -> None:
    run_dir, proxy = tmp_path / "runs", Proxy(server, "slow", delay=2.0)
    command = start(calm, run_dir, proxy.address, migrated_store)
    tally("Prefect API slow, 2 s a call", not (problem := lost(command, run_dir, calm, warnings=0)), problem)


@only_all
@pytest.mark.parametrize("mode", ["gone", "broken", "silent"])
@pytest.mark.parametrize("when", ["student", "train"])
def test_the_api_becomes_so_and_stays_so(
    mode: Mode, when: str, server: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally
) -> None:
    run_dir, proxy = tmp_path / "runs", Proxy(server)
    command = start(calm, run_dir, proxy.address, migrated_store)
    command.wait_until(steps(run_dir) if when == "train" else made(run_dir, when))
    proxy.set(mode)
    tally(f"Prefect API {mode} in mid-run", not (problem := lost(command, run_dir, calm, warnings=1)), problem)


@only_all
def test_the_api_is_killed_and_comes_back(server: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally) -> None:
    run_dir, proxy = tmp_path / "runs", Proxy(server)
    command = start(calm, run_dir, proxy.address, migrated_store)
    command.wait_until(made(run_dir, "student"))
    proxy.set("gone")
    command.wait_until(made(run_dir, "train"))
    proxy.set("pass")
    problem = lost(command, run_dir, calm, warnings=0)
    found = recorded(server, run_dir)
    whole = found["state"] == "COMPLETED" and set(found["tasks"]) == {"COMPLETED"} and found["pages"] >= 10
    tally("Prefect API killed and restarted", whole and not problem, f"{found}; {problem}")


@only_all
@pytest.mark.parametrize(("number", "warnings"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)], ids=["killed", "stopped"])
def test_our_own_server_fails(
    number: signal.Signals, warnings: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally
) -> None:
    run_dir = tmp_path / "runs"
    command = start(calm, run_dir, None, migrated_store)
    command.wait_until(made(run_dir, "student"))
    os.kill(own_server(command), number)
    tally(f"own Prefect server gets {number.name}", not (problem := lost(command, run_dir, calm, warnings)), problem)


def own_server(command: Command) -> int:
    assert command.process.pid is not None
    children = psutil.Process(command.process.pid).children(recursive=True)
    return next(child.pid for child in children if "uvicorn" in " ".join(child.cmdline()))


@only_all
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_without_the_api(
    number: signal.Signals, server: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally
) -> None:
    run_dir, proxy = tmp_path / "runs", Proxy(server)
    command = start(calm, run_dir, proxy.address, migrated_store)
    command.wait_until(steps(run_dir))
    proxy.set("gone")
    assert command.process.pid is not None
    os.kill(command.process.pid, number)
    code, said = command.wait(), command.output
    good = code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number] and not [text for text in CHATTER if text in said]
    tally(f"{number.name} without the Prefect API", good, f"{code}: {said}")


@only_all
@pytest.mark.parametrize("mode", ["gone", "broken", "silent"])
@pytest.mark.parametrize("when", ["start", "trial"])
def test_a_sweep_loses_no_trial(
    mode: Mode, when: str, server: int, migrated_store: Path, calm: Calm, tmp_path: Path, tally: Tally
) -> None:
    run_dir, proxy, config = tmp_path / "runs", Proxy(server, mode if when == "start" else "pass"), tmp_path / "sweep.yaml"
    axes = {"method": ["kd"], "train_seed": [10]}
    content = {"name": "tiny", "experiment": str(calm.folder / "experiment.yaml"), "axes": axes, "concurrency": 2}
    config.write_text(yaml.safe_dump({**content, "trial": {"threads": 1, "retries": 0}}, sort_keys=False))
    command = Command(["sweep", str(config)], run_dir, proxy.address, migrated_store)
    if when == "trial":
        command.wait_until(steps(run_dir))
        proxy.set(mode)
    code, said = command.wait(), command.output
    stages = ("train", "evaluate")
    found = [differences(*(results(each / "artifacts" / stage) for each in (calm.run_dir, run_dir))) for stage in stages]
    told = [line for line in said.splitlines() if line.startswith(WARNING)]
    good = code == 0 and not any(found) and len(told) == 1 and not [text for text in CHATTER if text in said]
    tally(f"Prefect API {mode} during a sweep", good, f"{code}, {found}: {said}")
