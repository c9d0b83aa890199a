"""What is left behind by processes that are gone: runs that still count as running, and runs that waited too long."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

from pipeline.locks import is_gone, this_process
from pipeline.remote import reason
from pipeline.tracking import PROCESS, configure_mlflow, stage_experiment

log = logging.getLogger(__name__)
_PAGE = 200


def own_flow_run(flow_run_id: UUID) -> None:
    """Remember that this process works on a flow run."""
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run_id, {PROCESS: this_process()})


def too_late(expected: datetime, allowed_minutes: float, now: datetime) -> str | None:
    """Why a run is skipped, None if it is in time."""
    late = now - expected
    if late <= timedelta(minutes=allowed_minutes):
        return None
    return (
        f"skipped: {late.total_seconds() / 60:.0f} minutes after its scheduled time {expected:%Y-%m-%d %H:%M %Z}, "
        f"allowed are {allowed_minutes:g} (max_lateness_minutes)"
    )


def crash_orphans(deployments: Sequence[UUID], alone: bool) -> list[str]:
    """Set flow runs to Crashed (Cancelled where that was asked) that count as running, but whose process is gone.

    Args:
        deployments: whose runs are looked at.
        alone: nothing else than this process can be about to start a run of them, so that one without a process is an
            orphan; otherwise it may belong to a worker, and is left to Prefect.

    Returns:
        Their names.
    """
    orphans = []
    with get_client(sync_client=True) as client:
        for run in _runs(deployments, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]):
            process = run.labels.get(PROCESS)
            if is_gone(str(process)) if process else alone:
                message = f"its process ({process or 'not started yet'}) is gone; found when serving began again"
                cancelling = run.state is not None and run.state.is_cancelling()
                ending: State[Any] = Cancelled(message=message) if cancelling else Crashed(message=message)
                # By force: the rules are made for the process that works on a run, and there is none.
                client.set_flow_run_state(run.id, ending, force=True)
                log.warning("flow run %s: %s, %s", run.name, ending.name, message)
                orphans.append(run.name)
    return orphans


def skip_late(deployments: Sequence[UUID], now: datetime | None = None) -> list[str]:
    """Set flow runs to Skipped that are scheduled, but for too long ago; returns their names.

    Each would skip itself, in a process of its own that has to start for it. After a week without this service there are many.
    """
    skipped = []
    with get_client(sync_client=True) as client:
        for run in _runs(deployments, [StateType.SCHEDULED]):
            settings = run.parameters.get("settings", {})
            allowed = settings.get("max_lateness_minutes")
            expected = run.expected_start_time
            message = allowed and expected and too_late(expected, allowed, now or datetime.now(UTC))
            if message:
                client.set_flow_run_state(run.id, Cancelled(name="Skipped", message=message), force=True)
                log.info("flow run %s: %s", run.name, message)
                skipped.append(run.name)
    return skipped


def kill_orphans(run_dir: Path, experiments: Iterable[str]) -> list[str]:
    """Set MLflow runs to KILLED that count as running, but whose process is gone; returns their names.

    Only runs that say which process works on them (tag `process`) are touched.
    """
    own = "MLFLOW_TRACKING_URI" in os.environ
    store = configure_mlflow(run_dir)
    if not own:
        del os.environ["MLFLOW_TRACKING_URI"]  # the runs that this process starts may have other run directories
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).is_file():
        return []
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    names, killed = [each for name in experiments for each in (name, stage_experiment(name))], []
    try:
        client = MlflowClient(store)
        found = [client.get_experiment_by_name(name) for name in names]
        ids = [experiment.experiment_id for experiment in found if experiment is not None]
        for run in client.search_runs(ids, "attributes.status = 'RUNNING'", max_results=1000) if ids else ():
            process = run.data.tags.get(PROCESS)
            if process and is_gone(process):
                client.set_terminated(run.info.run_id, "KILLED")
                log.warning("MLflow run %s: killed, its process (%s) is gone", run.info.run_name, process)
                killed.append(run.info.run_name)
    except (MlflowException, SQLAlchemyError) as error:  # serving does not depend on it, and the next start tries again
        log.warning("MLflow: cannot look for runs of processes that are gone: %s", reason(error))
    return killed


def _runs(deployments: Sequence[UUID], states: list[StateType]) -> list[FlowRun]:
    """Every flow run of some deployments in one of some states; all of them before any is changed."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=list(deployments)),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
    )
    runs: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE, offset=len(runs)):
            runs += page
    return runs
