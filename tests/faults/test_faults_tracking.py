"""A tracking server that dies, is away, is slow, is silent or answers 500: training does not notice, and MLflow has it all."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stages
from faults_run import CONTEXT
from faults_setup import ALL, Tally
from PIL import Image
from proxy import Mode, Proxy
from tracked_content import content

from pipeline.plan import Plan
from pipeline.stages import prepare
from pipeline.tracking import MLflowTracker, RunFacts, deliver, delivery, experiment_reference, run_reference, tracker
from pipeline.tracking.spool import spool_of, spools
from pipeline.training import loop
from pipeline.trial import run_trial, trial_key

STEPS = 6
BUDGET = {"max_steps": STEPS, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2, "seeds": [10]}
CHANGES: dict[str, Any] = {
    "methods": {"kd": None},
    "benchmarks": {"general": {"source": {"path": "general.jsonl"}}},
    "train": BUDGET,
    "validation": {"select": "loss", "every_steps": 3},
    "evaluation": {"decoding": {"max_new_tokens": 4}, "seeds": [1]},
}
SLOW_SECONDS = 2.0 if ALL else 0.03
# They name the experiment, or what it was planned from.
OWN_TAGS = {"config_fingerprint", "experiment_fingerprint", "git_commit"}
pytestmark = pytest.mark.timeout(600)


class Server:
    """MLflow's own server on a SQLite database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.start()

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTEST_"))}
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env={**own, **quiet}, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Wait until it answers."""
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class World:
    """What the tests share: an experiment whose inputs are made, a server, and what an undisturbed run leaves there."""

    folder: Path
    inputs: Path
    server: Server
    proxy: Proxy

    def plan(self, name: str) -> Plan:
        """The experiment under another name, in a run directory of its own."""
        run_dir = self.folder / name
        if not run_dir.exists():
            shutil.copytree(self.inputs, run_dir)
        return planned(self.folder, run_dir, name)

    def held(self, name: str) -> Any:
        """What the store has of it."""
        from mlflow import MlflowClient

        found = content(MlflowClient(f"http://127.0.0.1:{self.server.port}"), [name, f"{name} · stages"])
        for each in found.values():
            for run in each["runs"]:
                run["tags"] = {key: value for key, value in run["tags"].items() if key not in OWN_TAGS}
        return {
            key.replace(name, "NAME"): {**each, "tags": str(each["tags"]).replace(name, "NAME")} for key, each in found.items()
        }


def planned(folder: Path, run_dir: Path, name: str) -> Plan:
    changes = {**CHANGES, "benchmarks": {"general": {"source": {"path": str(folder / "experiment" / "general.jsonl")}}}}
    plan = stages.planned(folder / "experiment", run_dir=run_dir, name=name, **changes)
    plan.write_config()
    return plan


def work(plan: Plan, told: MLflowTracker) -> None:
    """A stage, a trial, and what its comparison adds."""
    name = plan.experiment.name
    stage = told.start(RunFacts("prepare/tiny", "prepare rows", f"{name} · stages", {"rows": 24}, {"stage": "prepare"}))
    told.log_files(stage, [plan.data.place.path / "manifest.json"], "stage")
    told.finish(stage, "FINISHED")
    trial = next(trial for trial in plan.trials if trial.train is not None)
    run_trial(plan, trial, plan.config_path, told, {"prepare": stage})
    run, png = trial_key(trial), io.BytesIO()
    Image.new("RGB", (4, 3)).save(png, format="png")
    told.log_image(run, "figures/scores", png.getvalue())
    links = f"experiments/{experiment_reference(name)}/runs/{run_reference(run)}"
    told.describe(run, name, {"mlflow.note.content": links})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tracking")
    server = Server(folder)
    try:
        plan = planned(folder, folder / "inputs", "inputs")
        stages.run_inputs(plan)
        for benchmark in plan.benchmarks:
            prepare.run_benchmark(benchmark)
        server.wait()
        yield World(folder, folder / "inputs", server, Proxy(server.port, delay=SLOW_SECONDS))
    finally:
        server.kill()


@pytest.fixture
def proxy(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What the tracker takes for the server."""
    world.proxy.set("pass")
    world.proxy.calls = 0
    for name, value in settings(world.proxy).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(delivery, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(delivery, "LONGEST_DELAY", 0.2)
    monkeypatch.setattr(delivery, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 200.0)
    monkeypatch.setattr(tracker, "SHORT_PATIENCE_SECONDS", 200.0)
    yield world.proxy


def settings(proxy: Proxy) -> dict[str, str]:
    address = proxy.address.removesuffix("/api")
    return {"MLFLOW_TRACKING_URI": address, "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}


@pytest.fixture
def expected(world: World, proxy: Proxy) -> Any:
    if not (world.folder / "undisturbed").exists():
        run(world.plan("undisturbed"))
    return world.held("undisturbed")


def run(plan: Plan) -> bool:
    """Do the work; whether the server has everything afterwards."""
    with MLflowTracker(plan.run_dir, plan.experiment.name) as told:
        work(plan, told)
    return told.complete


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], None]]) -> None:
    """Do something in the midst of training, before an optimiser step."""
    real, steps = loop.optimizer_step, iter(range(1, 100))

    def stepping(*args: Any, **named: Any) -> Any:
        actions.get(next(steps), lambda: None)()
        return real(*args, **named)

    monkeypatch.setattr(loop, "optimizer_step", stepping)


def delivered_steps(plan: Plan) -> int:
    """The last step of the trial that the server has, -1 before it has one."""
    trial = next(trial for trial in plan.trials if trial.train is not None)
    spool = spool_of(plan.run_dir / plan.experiment.name / "mlflow_runs", trial_key(trial))
    series = spool.progress(os.environ["MLFLOW_TRACKING_URI"]).series.get("steps")
    return -1 if series is None else series.step


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def lost(expected: Any, found: Any) -> str:
    return "" if found == expected else f"expected:\n{expected}\nfound:\n{found}"


def test_killed_and_restarted_in_the_midst_of_training(
    world: World, proxy: Proxy, expected: Any, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plan = world.plan("restarted")
    # A start takes seconds; to the tracker a port that nobody listens on is the same.
    kill, start = (world.server.kill, world.server.start) if ALL else (lambda: proxy.set("gone"), lambda: proxy.set("pass"))

    def kill_when_it_has_steps() -> None:
        until(lambda: delivered_steps(plan) >= 1)
        kill()

    at_step(monkeypatch, {4: kill_when_it_has_steps, 6: start})
    complete = run(plan)
    tally("MLflow server killed and restarted", complete, lost(expected, world.held("restarted")))
    assert world.held("restarted") == expected


def test_away_from_the_start_and_there_for_the_next_command(
    world: World, proxy: Proxy, expected: Any, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plan = world.plan("away")
    proxy.set("gone")
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "SHORT_PATIENCE_SECONDS", 0.1)
        complete = run(plan)
    assert not complete and delivered_steps(plan) == -1
    proxy.set("pass")
    left = deliver(plan.run_dir)
    tally("MLflow server away from the start", left == {"away": 0}, str(left))
    assert world.held("away") == expected


@pytest.mark.parametrize("mode", ["silent", "broken", "slow"] if ALL else ["slow"])
def test_silent_broken_or_slow_for_all_of_training(
    mode: Mode, world: World, proxy: Proxy, expected: Any, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """The trial is done from its first step to its last while no call, or only a slow one, gets an answer."""
    plan = world.plan(mode)
    proxy.set(mode)
    with MLflowTracker(plan.run_dir, plan.experiment.name) as told:
        work(plan, told)
        trained, reached = plan.trials[-1].finished(), proxy.calls > 0
        if mode != "slow":
            assert delivered_steps(plan) == -1
            until(lambda: proxy.calls > 0)
            proxy.set("pass")
    tally(f"MLflow server {mode}", trained and told.complete, f"trained: {trained}, called: {reached}")
    assert world.held(mode) == expected


def _trains_until_killed(folder: Path, run_dir: Path, name: str, step: int, environment: dict[str, str]) -> None:
    """In a process of its own: train, and be killed before a step."""
    os.environ.update(environment)
    real, steps = loop.optimizer_step, iter(range(1, 100))

    def stepping(*args: Any, **named: Any) -> Any:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    loop.optimizer_step = stepping
    run(planned(folder, run_dir, name))


@pytest.mark.parametrize("moment", range(8 if ALL else 1))
def test_the_trainer_is_killed_while_the_server_is_away(
    moment: int, world: World, proxy: Proxy, expected: Any, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    chosen = random.Random(moment)
    name, step, mode = f"killed{moment}", chosen.randrange(2, STEPS + 1), chosen.choice(["gone", "broken", "slow", "pass"])
    plan = world.plan(name)
    proxy.set("gone" if moment == 0 else mode)
    arguments = (world.folder, plan.run_dir, name, step, settings(proxy))
    process = CONTEXT.Process(target=_trains_until_killed, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    proxy.set("pass")
    left = deliver(plan.run_dir)  # without going on: everything that it had done by then
    reached = delivered_steps(plan)
    tally("SIGKILL, server away: no step is lost", (reached, left) == (step - 1, {name: 0}), f"step {step}: {reached}, {left}")
    complete = run(plan)
    tally("SIGKILL, server away: everything after it went on", complete, lost(expected, world.held(name)))
    assert world.held(name) == expected


def test_a_second_call_tells_nothing_again(world: World, proxy: Proxy, expected: Any) -> None:
    plan = world.plan("undisturbed")
    folder = plan.run_dir / "undisturbed" / "mlflow_runs"
    before = {spool.key: [record["op"] for record, _ in spool.records()] for spool in spools(folder)}
    trial = next(trial for trial in plan.trials if trial.train is not None)
    with MLflowTracker(plan.run_dir, plan.experiment.name) as told:
        assert not run_trial(plan, trial, plan.config_path, told, {"prepare": "prepare/tiny"})
    assert {spool.key: [record["op"] for record, _ in spool.records()] for spool in spools(folder)} == before
    assert world.held("undisturbed") == expected
