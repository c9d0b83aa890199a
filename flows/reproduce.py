"""The whole experiment, readable as the picture: prepare → teacher → student → cache → train → evaluate → compare."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from flows.inputs import Made, make_generations, make_models, make_rows
from flows.outage import wait_for_recording
from pipeline.config import load_experiment
from pipeline.plan import Plan, plan_experiment
from pipeline.stages.compare import Trial
from pipeline.tracked import mark_tracked
from pipeline.tracking import MLflowTracker, Tracker, tracked
from pipeline.training.device import flush_denormals
from pipeline.trial import finish_trial, is_told, trial_facts
from tasks.compare import compare
from tasks.evaluate import evaluate
from tasks.lens_profile import profile_lens
from tasks.train import train

STAGES = ("prepare", "cache", "train", "evaluate", "compare")


@flow(name="reproduce", flow_run_name="{config}", validate_parameters=False, log_prints=False)
def reproduce(config: str, overrides: list[str], run_dir: str, until: str = "compare") -> None:
    """Run an experiment from its file.

    Args:
        config: path of the experiment file.
        overrides: `dotted.path=value` settings.
        run_dir: where everything goes.
        until: last stage to run, one of STAGES.
    """
    flush_denormals()
    plan = plan_experiment(load_experiment(Path(config), overrides), Path(run_dir))
    plan.write_config()
    with MLflowTracker(plan.run_dir, plan.experiment.name) as tracker:
        run_stages(plan, tracker, until)
    if until == STAGES[-1] and tracker.complete:
        mark_tracked(plan.comparison, plan.run_dir)


def run_stages(plan: Plan, tracker: Tracker, until: str) -> None:
    """The flow's body."""
    last, made = STAGES.index(until), Made()
    stage_runs = make_rows(plan, tracker, made)
    if last >= STAGES.index("cache"):
        stage_runs |= make_models(plan, tracker, made)
    tasks = 0
    if last >= STAGES.index("train"):
        stage_runs |= make_generations(plan, tracker, made)
        for trial in plan.trials:
            tasks += run_trial(plan, trial, tracker, stage_runs, evaluates=last >= STAGES.index("evaluate"))
    if last >= STAGES.index("compare"):
        compare(plan.comparison, tracker)
        tasks += 1
    if flow_run.id is not None:
        wait_for_recording(UUID(str(flow_run.id)), tasks + len(made))


def run_trial(plan: Plan, trial: Trial, tracker: Tracker, stage_runs: dict[str, str], evaluates: bool) -> int:
    """One row of the comparison, as one flat run; returns the number of tasks that ran."""
    if is_told(trial, tracker):
        return 0
    run_id = tracker.start(trial_facts(plan, trial, stage_runs))
    with tracked(tracker, run_id):
        if trial.train is not None:
            train(trial.train, run_id, tracker)
        if evaluates:
            evaluate(trial, run_id, tracker)
            if trial.profile is not None:
                profile_lens(trial.profile, run_id, tracker)
            finish_trial(trial, plan.config_path, run_id, tracker, stage_runs, plan.experiment.tracking.log_models)
    return (trial.train is not None) + evaluates * (1 + (trial.profile is not None))
