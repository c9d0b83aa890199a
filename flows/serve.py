"""Deployments: flows with a schedule and a form in the Prefect UI, and the process that serves them.

Import this after `flows.engine.configure_prefect`, as Prefect reads its settings when it is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import CancelledRun, FailedRun, ObjectNotFound
from prefect.runner import Runner
from prefect.runner._scheduled_run_poller import ScheduledRunPoller
from prefect.runtime import flow_run
from prefect.schedules import Cron as PrefectCron
from prefect.schedules import Interval as PrefectInterval
from prefect.schedules import Schedule as PrefectSchedule
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOGGING_EXTRA_LOGGERS,
    PREFECT_LOGGING_LEVEL,
    temporary_settings,
)
from prefect.states import Cancelled, Completed, Failed
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from flows.automations import HEARTBEAT_SECONDS, ensure_zombie_automation
from flows.engine import configure_prefect, server_process, users_server
from flows.outage import tell
from flows.reconcile import crash_orphans, kill_orphans, own_flow_run, skip_late, too_late
from flows.trial import trial
from pipeline.artifacts import write_text_atomically
from pipeline.config import load_experiment
from pipeline.config.loading import load_sweep
from pipeline.config.serve import Cron, Deployment, Interval, Parameters, Serve, TrialDeployment, load_serve, parameters_of
from pipeline.errors import ConfigError, PipelineError
from pipeline.locks import exclusive, held
from pipeline.processes import exit_on_sigterm

log = logging.getLogger(__name__)
TAG = "distilllens"
"""On every deployment and its runs."""
_LOGGERS = ["pipeline", "flows"]
"""Whose messages a run's page in the UI shows beside Prefect's own."""
_ANCHOR = datetime(2024, 1, 1)


def _run_name() -> str:
    name = Path(flow_run.parameters["settings"].config).stem
    return f"{name} {flow_run.scheduled_start_time:%Y-%m-%d %H:%M}"


@flow(flow_run_name=_run_name, retries=0)
def scheduled_reproduce(settings: Parameters) -> State[Any]:
    """Run an experiment from its file, as `distilllens reproduce` does."""
    return _carry_out(settings, lambda: _experiment(settings, "compare"))


@flow(flow_run_name=_run_name, retries=0)
def scheduled_evaluate(settings: Parameters) -> State[Any]:
    """Train what is missing and score every model of an experiment, as `distilllens evaluate` does."""
    return _carry_out(settings, lambda: _experiment(settings, "evaluate"))


@flow(flow_run_name=_run_name, retries=0)
def scheduled_sweep(settings: Parameters) -> State[Any]:
    """Run what is missing of a sweep, as `distilllens sweep` does."""
    return _carry_out(settings, lambda: _sweep(settings))


FLOWS: dict[str, Flow[[Parameters], State[Any]]] = {
    "reproduce": scheduled_reproduce,
    "evaluate": scheduled_evaluate,
    "sweep": scheduled_sweep,
}


def _carry_out(settings: Parameters, work: Callable[[], str]) -> State[Any]:
    """Do a run's work unless it is too late; what it came to becomes the message of its final state."""
    from pipeline.training.stopping import Stopped

    skipped = too_late(flow_run.scheduled_start_time, settings.max_lateness_minutes, datetime.now(UTC))
    if skipped is not None:
        return _short(Cancelled(name="Skipped", message=skipped))  # no success: nothing was done
    own_flow_run(UUID(str(flow_run.id)))
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return Completed(message=work())
    except Stopped as error:
        return _short(Cancelled(message=str(error)))
    except PipelineError as error:  # a state instead of the exception: the message, without a traceback around it
        return _short(Failed(message=str(error)))
    finally:
        tell()


def _short(state: State[Any]) -> State[Any]:
    logging.getLogger("prefect.flow_runs").addFilter(_says_something_new)
    return state


def _says_something_new(record: logging.LogRecord) -> bool:
    """A filter: Prefect logs every state with its message, and one that is not Completed again, as a traceback of its own."""
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun | CancelledRun))


def _experiment(settings: Parameters, until: str) -> str:
    from flows.reproduce import reproduce
    from pipeline.plan import check_inputs, plan_experiment
    from pipeline.tracked import is_tracked

    plan = plan_experiment(load_experiment(Path(settings.config), settings.overrides), Path(settings.run_dir))
    if is_tracked(plan.comparison, plan.run_dir):
        return _said(len(plan.trials), 0)
    missing = [item for item in plan.trials if not item.finished()]
    check_inputs(plan)
    reproduce.fn(settings.config, settings.overrides, settings.run_dir, until)
    return _said(len(plan.trials), len(missing))


def _sweep(settings: Parameters) -> str:
    from flows.sweep import sweep
    from pipeline.sweeps.plan import check_points, plan_known
    from pipeline.tracked import is_tracked

    run_dir = Path(settings.run_dir)
    known = plan_known(load_sweep(Path(settings.config)), settings.overrides, run_dir)
    if known.whole and is_tracked(known.comparison, run_dir):
        return _said(len(known.plan.trials), 0)  # nothing of the engine is started for it
    check_points(known.plan)
    return sweep.fn(settings.config, settings.overrides, settings.run_dir).outcome.text()


def _said(finished: int, ran: int) -> str:
    return f"{finished} trials finished ({ran} of them now)" if ran else f"nothing new: {finished} trials finished"


def deployments_of(settings: Serve, pool: str | None = None) -> list[RunnerDeployment]:
    """Every deployment of a file, not registered yet.

    Args:
        settings: the file.
        pool: work pool whose workers run them; None for this process.
    """
    # A worker has an environment of its own; a process that this one starts gets the same through the settings.
    environment = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS), "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(_LOGGERS),
    }  # fmt: skip
    made = [_deployment(name, item) for name, item in settings.deployments.items()]
    if settings.trial.enabled:
        made.append(_trial_deployment(settings.trial))
    for each in made:
        # Set here and not when it is made: only so an earlier registration with another pool is cleared.
        each.work_pool_name = pool
        each.work_queue_name = None
        each.job_variables = {"env": environment} if pool else {}
    return made


def _deployment(name: str, settings: Deployment) -> RunnerDeployment:
    return RunnerDeployment.from_flow(
        FLOWS[settings.flow],
        name=name,
        schedule=_schedule(settings.schedule),
        paused=_is_paused(f"{FLOWS[settings.flow].name}/{name}") if settings.paused is None else settings.paused,
        # The next run does whatever is missing by then, so that nothing is lost when this one finds another at work and is
        # cancelled. Queued runs would only pile up behind a long one, to find nothing new one after the other.
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        parameters={"settings": parameters_of(settings).model_dump(mode="json")},
        description=settings.description or None,
        tags=[TAG, *settings.tags],
        enforce_parameter_schema=True,
        entrypoint_type=EntrypointType.MODULE_PATH,  # the installed package, wherever a worker has it
    )


def _trial_deployment(settings: TrialDeployment) -> RunnerDeployment:
    # Without a limit: how many trials run at a time is the sweep's `concurrency`.
    return RunnerDeployment.from_flow(
        trial, name=settings.name, tags=[TAG, *settings.tags], entrypoint_type=EntrypointType.MODULE_PATH
    )


def _schedule(settings: Cron | Interval | None) -> PrefectSchedule | None:
    if settings is None:
        return None
    if isinstance(settings, Cron):
        return PrefectCron(settings.cron, timezone=settings.timezone)
    anchor = settings.anchor or _ANCHOR
    if anchor.tzinfo is None:
        anchor = anchor.replace(tzinfo=ZoneInfo(settings.timezone))
    return PrefectInterval(timedelta(minutes=settings.interval_minutes), anchor_date=anchor, timezone=settings.timezone)


def _is_paused(full_name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(full_name).paused
        except ObjectNotFound:
            return False


def main(config_path: Path, run_dir: Path | None = None, work_pool: str | None = None) -> None:
    """Register the deployments of a file and serve them until interrupted.

    Args:
        config_path: file of deployments.
        run_dir: of the deployments that name none, and of the Prefect server that is started where none is configured.
        work_pool: leave the runs to the workers of this pool instead of executing them here.

    Raises:
        ConfigError: the file or one that it names is wrong, or its port is taken.
        ArtifactError: another process serves this run directory.
        ServerFailed: the Prefect server did not start.
    """
    folder = (run_dir or Path("runs")).resolve()
    settings = load_serve(config_path, folder)
    stores = _stores(settings)
    (folder / ".prefect").mkdir(parents=True, exist_ok=True)
    exit_on_sigterm()
    with exclusive(_lock(folder), wait_seconds=0), _api(folder, settings.port) as address, _settings(address):
        runner = Runner(name=TAG, pause_on_shutdown=False, limit=settings.limit, heartbeat_seconds=HEARTBEAT_SECONDS)
        ids = _register(settings, runner, work_pool)
        ensure_zombie_automation(TAG)
        crash_orphans(ids, alone=users_server() is None and work_pool is None)
        skip_late(ids)
        for store, experiments in stores.items():
            kill_orphans(store, experiments)
        print(_greeting(settings, address, work_pool), flush=True)
        if work_pool is None:
            _outlast_outages()
            asyncio.run(_execute(runner))
        elif users_server() is None:
            threading.Event().wait()


def _outlast_outages() -> None:
    """Let the service wait for the API: Prefect 3.8 gives it up, with the runs at work, at the third failure in a row."""
    poll, away = ScheduledRunPoller._get_and_submit_flow_runs, False

    async def patiently(self: ScheduledRunPoller, task_group: Any = None) -> None:
        nonlocal away
        try:
            await poll(self, task_group)
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if not away:
                log.warning("the Prefect API does not answer (%s); runs at work go on, others start when it is back", error)
            away = True
        else:
            away = False

    ScheduledRunPoller._get_and_submit_flow_runs = patiently  # type: ignore[method-assign]


async def _execute(runner: Runner) -> None:
    """Execute runs until SIGTERM or Ctrl-C; those at work are cancelled then, with time for a checkpoint."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()

    def ask(*_: object) -> None:
        loop.call_soon_threadsafe(asked.set)

    # Prefect 3.8's own handler never awaits the runner's stop: it kills the runs at once and leaves them Running.
    runner.handle_sigterm = ask  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, ask)
    serving, asking = asyncio.create_task(runner.start()), asyncio.create_task(asked.wait())
    await asyncio.wait({serving, asking}, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    if asked.is_set() and runner.started:
        await runner.astop()
    await serving


def set_paused(name: str, paused: bool, run_dir: Path | None = None) -> str:
    """Pause or resume a deployment's schedule, on the server that serves it; returns its full name.

    Args:
        name: of the deployment, with or without its flow's.
        paused: True removes the runs that are scheduled already; False schedules new ones.
        run_dir: of the service, where no Prefect server is configured.

    Raises:
        ConfigError: there is no deployment of that name.
    """
    folder = (run_dir or Path("runs")).resolve()
    with _settings(_served_address(folder)), get_client(sync_client=True) as client:
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        flows = {each.id: each.name for each in client.read_flows()}
        known = {f"{flows[each.flow_id]}/{each.name}": each.id for each in client.read_deployments(deployment_filter=ours)}
        chosen = [full for full in known if name in (full, full.partition("/")[2])]
        if len(chosen) != 1:
            raise ConfigError(
                f"{name!r} is {'more than one' if chosen else 'no'} deployment (there are: {', '.join(known) or '-'}); "
                "give one of them"
            )
        (client.pause_deployment if paused else client.resume_deployment)(known[chosen[0]])
    return chosen[0]


def _stores(settings: Serve) -> dict[Path, set[str]]:
    """Run directory → experiments in it. A file that does not load stops the service here, at its start."""
    stores: dict[Path, set[str]] = {}
    for item in settings.deployments.values():
        loaded = load_sweep(item.config) if item.flow == "sweep" else load_experiment(item.config, item.overrides)
        stores.setdefault(Path(parameters_of(item).run_dir), set()).add(loaded.name)
    return stores


def _register(settings: Serve, runner: Runner, pool: str | None) -> list[UUID]:
    if pool is not None:
        _ensure_pool(pool)
    made = deployments_of(settings, pool)
    ids: list[Any] = [each.apply() if pool is not None else runner.add_deployment(each) for each in made]
    return ids  # typed as a coroutine too, which they are only where the caller is one


def _ensure_pool(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
            log.info("work pool %s: created, type process", name)


def _greeting(settings: Serve, address: str, pool: str | None) -> str:
    lines = [f"Prefect UI: {address.removesuffix('/api')} (Ctrl-C ends the service)"]
    for name, item in settings.deployments.items():
        when = "on request" if item.schedule is None else _describe(item.schedule)
        lines.append(f"  {FLOWS[item.flow].name}/{name}: {when}")
    if pool is not None:
        lines.append(f"PREFECT_API_URL={address} prefect worker start --pool {pool}")
    return "\n".join(lines)


def _describe(schedule: Cron | Interval) -> str:
    when = schedule.cron if isinstance(schedule, Cron) else f"every {schedule.interval_minutes:g} minutes"
    return f"{when} ({schedule.timezone})"


def _settings(address: str | None) -> contextlib.AbstractContextManager[Any]:
    """Settings of this process and of the runs that it starts: whose server, and what of their logs it gets."""
    changes: dict[Any, Any] = {
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: HEARTBEAT_SECONDS,
        PREFECT_LOGGING_EXTRA_LOGGERS: _LOGGERS,
        PREFECT_LOGGING_LEVEL: "INFO",
    }
    return temporary_settings({**changes, PREFECT_API_URL: address} if address else changes)


@contextlib.contextmanager
def _api(folder: Path, port: int) -> Iterator[str]:
    """The API of the user's Prefect server, or of one that lives as long as this context."""
    own = users_server()
    if own is not None:
        yield own
        return
    configure_prefect(folder)
    with own_server(folder, port) as address:
        write_text_atomically(_address_file(folder), json.dumps({"api": address}))
        yield address


@contextlib.contextmanager
def own_server(folder: Path, port: int) -> Iterator[str]:
    """A Prefect server on loopback, with its database under `folder`; it ends with this process, however that ends."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(
                f"port: {port} is taken; give another in the file, or PREFECT_API_URL if a Prefect server is there"
            ) from None
    serving = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}/api"
    with server_process(serving, {}, address, folder / ".prefect" / "server.log"):
        yield address


def _served_address(folder: Path) -> str | None:
    """The API of a service of this run directory that runs now; None leaves it to Prefect's settings."""
    if users_server() is not None or not held(_lock(folder)):
        return None
    try:
        return str(json.loads(_address_file(folder).read_text(encoding="utf-8"))["api"])
    except FileNotFoundError:
        return None


def _lock(folder: Path) -> Path:
    return folder / ".prefect" / "serve.lock"


def _address_file(folder: Path) -> Path:
    return folder / ".prefect" / "serve.json"
