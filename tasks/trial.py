"""Task: one trial of a sweep in a process of its own, on whatever machine the engine runs this."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from pipeline.artifacts import write_text_atomically
from pipeline.errors import PipelineError
from pipeline.processes import Outcome, run_process

log = logging.getLogger(__name__)
T = TypeVar("T")
_POLL_SECONDS = 1.0
_AWAY_SECONDS = 1800.0
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
    name, key = str(spec["name"]), str(uuid4())

    def submit() -> Any:  # the key makes a second request after a lost answer the same run
        return run_deployment(deployment, parameters=parameters, flow_run_name=name, timeout=0, idempotency_key=key)

    started = _patiently(name, submit)
    assert isinstance(started, FlowRun)  # it is a coroutine only where the caller is one
    with get_client(sync_client=True) as client:
        while True:
            state = _patiently(name, lambda: client.read_flow_run(started.id)).state
            if state is not None and state.is_final():
                break
            if _STOP.wait(_POLL_SECONDS):
                client.set_flow_run_state(started.id, Cancelling(), force=True)
                raise TrialRefused(f"{spec['name']}: stopped; run the sweep again to go on")
    if not state.is_completed():
        raise TrialFailed(f"{spec['name']}: {state.message or state.name} (flow run {started.name})")


def _patiently(name: str, call: Callable[[], T]) -> T:
    """Call the API until it answers: what runs elsewhere goes on meanwhile."""
    deadline, told = time.monotonic() + _AWAY_SECONDS, False
    while True:
        try:
            return call()
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if time.monotonic() > deadline:
                raise TrialFailed(f"{name}: the Prefect API has not answered for {_AWAY_SECONDS / 60:.0f} minutes") from None
            if not told:
                log.warning("%s: the Prefect API does not answer (%s); the trial goes on, and is asked for later", name, error)
                told = True
        if _STOP.wait(_POLL_SECONDS):
            raise TrialRefused(f"{name}: stopped")


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
        return TrialRefused(f"{name}: stopped; run the sweep again to go on")
    if outcome.timed_out:
        return TrialRefused(
            f"{name}: over its time limit of {(time_limit or 0) / 60:g} minutes; its checkpoint is kept, raise it to go on"
        )
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
