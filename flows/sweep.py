"""A sweep: the shared stages once, then a process for each trial, as many at a time as the file says, then the comparison."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Task, flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

from flows.inputs import Made, make_generations, make_models, make_rows
from flows.outage import wait_for_recording
from flows.runners import task_runner
from pipeline.config.loading import load_sweep
from pipeline.config.sweep import Sweep, WorkPoolEngine
from pipeline.plan import write_config
from pipeline.stages.place import obtain
from pipeline.sweeps.accepted import SweepRegressed, check_accepted
from pipeline.sweeps.outcome import Outcome, Result, SweepFailed, objective
from pipeline.sweeps.plan import (
    SweepPlan,
    SweepTrial,
    base_experiment,
    base_settings,
    minimises,
    plan_points,
    plan_sweep_comparison,
)
from pipeline.sweeps.points import Point, search
from pipeline.sweeps.slots import Slot, sweep_slots
from pipeline.tracked import mark_tracked
from pipeline.tracking import MLflowTracker, Tracker
from pipeline.training.device import flush_denormals
from pipeline.trial import is_told
from pipeline.worker import spec_of
from tasks.compare import compare
from tasks.pages import show_page
from tasks.trial import let_trials_run, run_trial, run_trial_elsewhere, stop_trials, tried_again

log = logging.getLogger(__name__)
Start = Callable[[SweepTrial, Slot], PrefectFuture[Any]]


@dataclass
class Ledger:
    """What one call has done so far, over all batches of the search."""

    made: Made = field(default_factory=dict)
    seen: dict[str, SweepTrial] = field(default_factory=dict)
    started: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def outcome(self) -> Outcome:
        """What it came to."""
        finished = tuple(trial for trial in self.seen.values() if trial.trial.finished())
        return Outcome(finished, self.started - len(self.failed), self.failed, tuple(self.left))


@flow(name="sweep", flow_run_name="{config}", validate_parameters=False, log_prints=False)
def sweep(config: str, overrides: list[str], run_dir: str, accept: bool = False) -> Result:
    """Run what is missing of a sweep, and compare what is finished with each other and with what was last accepted.

    Args:
        config: path of the sweep file.
        overrides: `dotted.path=value` settings of its base experiment.
        run_dir: where everything goes.
        accept: take the scores as they are, also where they are below the last accepted ones.

    Raises:
        SweepFailed: trials failed; the others are finished and compared.
        SweepRegressed: rows score below what was last accepted by more than noise.
    """
    flush_denormals()
    let_trials_run()
    settings, folder, ledger = load_sweep(Path(config)), Path(run_dir), Ledger()
    base = base_settings(settings, overrides)
    write_config(folder / settings.name / "config.yaml", base_experiment(base))
    deadline = time.monotonic() + settings.budget.hours * 3600 if settings.budget.hours else None

    with MLflowTracker(folder, settings.name) as tracker:

        def batch(points: Sequence[Point]) -> list[float | None] | None:
            plan = plan_points(settings, base, points, folder)
            run_missing(settings, plan, tracker, ledger, deadline)
            if ledger.left:
                return None  # the budget is spent
            return [objective([plan.trials[index] for index in rows]) for rows in plan.rows]

        search(settings, batch, minimises(base))
        outcome = ledger.outcome()
        comparison, regressed = plan_sweep_comparison(settings, base, outcome.finished, folder), list[str]()
        if outcome.finished:
            compare(comparison, tracker)
            ledger.made["compare"] = ""
            check = check_accepted(outcome.finished, folder, settings.name, accept)
            if check.changed or check.not_comparable:
                title = f"{settings.name}: against the last accepted scores"
                show_page(f"accepted-{comparison.place.fingerprint}", title, check.markdown())
            regressed = [] if accept else [drop.text() for drop in check.regressed]
    if outcome.finished and not (outcome.failed or outcome.left) and tracker.complete:
        mark_tracked(comparison, folder)
    if flow_run.id is not None:
        wait_for_recording(UUID(str(flow_run.id)), len(ledger.made) + ledger.started)
    log.info("%s", outcome.text())
    if outcome.failed:
        raise SweepFailed("\n".join([f"{outcome.text()}:", *(f"  - {reason}" for reason in outcome.failed.values())]))
    if regressed:
        raise SweepRegressed(
            "\n".join([f"{len(regressed)} rows score below what was last accepted by more than noise:", *regressed])
            + "\n  distilllens sweep --accept takes the new scores as they are"
        )
    return Result(comparison, outcome)


def run_missing(settings: Sweep, plan: SweepPlan, tracker: Tracker, ledger: Ledger, deadline: float | None) -> None:
    """Carry out every trial of a batch that is neither finished nor seen before."""
    fresh = {f"{trial.fingerprint} {trial.trial.name}": trial for trial in plan.trials}
    fresh = {key: trial for key, trial in fresh.items() if key not in ledger.seen}
    ledger.seen |= fresh
    waiting = deque(trial for trial in fresh.values() if not is_told(trial.trial, tracker))
    if not waiting:
        return
    stage_runs = {id(trial.plan): _inputs(trial, tracker, ledger.made) for trial in waiting}
    limit = settings.trial.time_limit_minutes and settings.trial.time_limit_minutes * 60

    def may_start() -> bool:
        spent = settings.budget.trials is not None and ledger.started >= settings.budget.trials
        return not spent and (deadline is None or time.monotonic() < deadline)

    with task_runner(settings) as runner:

        def start(trial: SweepTrial, slot: Slot) -> PrefectFuture[Any]:
            ledger.started += 1
            log.info("%s: started", trial.trial.name)
            spec = spec_of(trial.plan, trial.trial, stage_runs[id(trial.plan)])
            parameters: dict[str, Any] = {"spec": spec, "environment": slot, "time_limit": limit}
            work: Task[..., Any] = run_trial
            if isinstance(settings.engine, WorkPoolEngine):
                work, parameters = run_trial_elsewhere, {**parameters, "deployment": settings.engine.deployment}
            again = work.with_options(retries=settings.trial.retries, retry_condition_fn=tried_again)
            future: PrefectFuture[Any] = runner.submit(again, parameters)
            return future

        for trial, failure in in_turn(waiting, sweep_slots(settings), start, may_start):
            if failure is None:
                for place in trial.trial.places:
                    obtain(place)  # from the shared store, where another machine did the work
                log.info("%s: finished", trial.trial.name)
            else:
                ledger.failed[trial.trial.name] = failure
                log.error("%s", failure)
    ledger.left += [trial.trial.name for trial in waiting]


def in_turn(
    waiting: deque[SweepTrial], slots: Sequence[Slot], start: Start, may_start: Callable[[], bool]
) -> Iterator[tuple[SweepTrial, str | None]]:
    """Start a waiting trial whenever a slot is free, and give each with its failure, if any, as it ends.

    What may not be started stays in `waiting`. If the caller is interrupted, every running trial is stopped first.
    """
    free, ended = deque(slots), queue.SimpleQueue[PrefectFuture[Any]]()
    running: dict[UUID, tuple[SweepTrial, Slot, PrefectFuture[Any]]] = {}
    try:
        while waiting or running:
            while waiting and free and may_start():
                trial, slot = waiting.popleft(), free.popleft()
                future = start(trial, slot)
                running[future.task_run_id] = (trial, slot, future)
                future.add_done_callback(ended.put)
            if not running:
                return
            trial, slot, future = running.pop(_next(ended).task_run_id)
            free.append(slot)
            yield trial, _failure(trial, future)
    except BaseException:
        stop_trials()
        for _, _, future in running.values():
            future.wait()
        raise


def _inputs(trial: SweepTrial, tracker: Tracker, made: Made) -> dict[str, str]:
    plan = trial.plan
    runs = {**make_rows(plan, tracker, made), **make_models(plan, tracker, made)}
    return {**runs, **make_generations(plan, tracker, made)}


def _next(ended: queue.SimpleQueue[PrefectFuture[Any]]) -> PrefectFuture[Any]:
    while True:  # with a limit, so that signals are handled meanwhile
        try:
            return ended.get(timeout=1.0)
        except queue.Empty:
            continue


def _failure(trial: SweepTrial, future: PrefectFuture[Any]) -> str | None:
    future.wait()
    state = future.state
    if state.is_completed():
        return None
    cause = state.result(raise_on_failure=False)
    text = str(cause) if isinstance(cause, Exception) else (state.message or state.name or "ended")
    return text if text.startswith(trial.trial.name) else f"{trial.trial.name}: {text}"
