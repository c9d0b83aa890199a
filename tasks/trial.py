"""Task: one trial of a sweep in a process of its own, on whatever machine the engine runs this."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from pipeline.artifacts import write_text_atomically
from pipeline.errors import PipelineError
from pipeline.processes import Outcome, run_process

_POLL_SECONDS = 1.0
_STOP = threading.Event()
"""Set when the flow is to end: no trial of this process goes on, and none is tried again."""


class TrialFailed(PipelineError):
    """A trial's process died; another attempt goes on from its checkpoint."""

    exit_code = 1


class TrialRefused(TrialFailed):
    """A trial that would fail again: bad input, out of time, or stopped."""


def let_trials_run() -> None:
    """Begin a flow. A function, since engines copy the flow's body with the objects that it names, and this is none to copy."""
    _STOP.clear()


def stop_trials() -> None:
    """End the trials of this process; those that wait for another attempt are given up."""
    _STOP.set()


def tried_again(task_: Any, run: TaskRun, state: State[Any]) -> bool:
    """Whether another attempt makes sense."""
    failure = state.result(raise_on_failure=False)
    return not _STOP.is_set() and not isinstance(failure, TrialRefused)


@task(task_run_name="trial {spec[name]}", cache_policy=NO_CACHE)
def run_trial(spec: dict[str, Any], environment: Mapping[str, str], time_limit: float | None) -> float:
    """Carry out a trial where this task runs; returns its wall time in seconds.

    Raises:
        TrialFailed: the process died.
        TrialRefused: it ended with a message, ran out of time or was stopped.
    """
    return carry_out(spec, environment, time_limit)


@task(task_run_name="trial {spec[name]}", cache_policy=NO_CACHE)
def run_trial_elsewhere(
    spec: dict[str, Any], environment: Mapping[str, str], time_limit: float | None, deployment: str
) -> None:
    """Carry out a trial as a flow run of a deployment, on whichever worker of its pool takes it.

    Raises:
        TrialFailed: the flow run did not complete.
        TrialRefused: it was stopped.
    """
    parameters = {"spec": spec, "environment": dict(environment), "time_limit": time_limit}
    started = run_deployment(deployment, parameters=parameters, flow_run_name=spec["name"], timeout=0)
    assert isinstance(started, FlowRun)  # it is a coroutine only where the caller is one
    with get_client(sync_client=True) as client:
        while True:
            state = client.read_flow_run(started.id).state
            if state is not None and state.is_final():
                break
            if _STOP.wait(_POLL_SECONDS):
                client.set_flow_run_state(started.id, Cancelling(), force=True)
                raise TrialRefused(f"{spec['name']}: stopped")
    if not state.is_completed():
        raise TrialFailed(f"{spec['name']}: {state.message or state.name} (flow run {started.name})")


def carry_out(spec: dict[str, Any], environment: Mapping[str, str], time_limit: float | None) -> float:
    """Run a trial's process on this machine and wait for it; returns its wall time in seconds.

    Raises:
        TrialFailed, TrialRefused: see `run_trial`.
    """
    folder = trial_folder(spec)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "spec.json", json.dumps(spec, indent=1))
    command = [sys.executable, "-m", "pipeline.worker", str(folder / "spec.json")]
    log = folder / "log.txt"
    outcome = run_process(command, log, {"PYTHONUNBUFFERED": "1", **environment}, time_limit, _STOP)
    if outcome.code != 0:
        raise _failure(spec["name"], outcome, log, time_limit)
    return outcome.seconds


def trial_folder(spec: Mapping[str, Any]) -> Path:
    """Where a trial's log is: RUN_DIR/NAME/trials/TRIAL-FINGERPRINT."""
    slug = re.sub(r"[^A-Za-z0-9._=-]+", "_", spec["name"])[:80]
    return Path(str(spec["run_dir"])) / str(spec["experiment"]["name"]) / "trials" / f"{slug}-{spec['fingerprints'][0]}"


def _failure(name: str, outcome: Outcome, log: Path, time_limit: float | None) -> TrialFailed:
    if outcome.stopped:
        return TrialRefused(f"{name}: stopped")
    if outcome.timed_out:
        return TrialRefused(f"{name}: over its time limit of {(time_limit or 0) / 60:g} minutes; its checkpoint is kept")
    said = _last_message(log)
    if outcome.code == 2:
        return TrialRefused(f"{name}: {said}")
    how = f"signal {-outcome.code}" if outcome.code < 0 else f"exit code {outcome.code}"
    return TrialFailed(f"{name}: {how}: {said} (log: {log})")


def _last_message(log: Path) -> str:
    """The last line that a trial printed, without the line's time stamp."""
    with log.open("rb") as stream:
        stream.seek(max(0, os.path.getsize(log) - 4096))
        lines = [line for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no output"
