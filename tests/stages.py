"""Running stages of a tiny experiment one after another, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experiment

from pipeline.config import load_experiment
from pipeline.plan import Plan, plan_experiment
from pipeline.stages import cache, evaluate, prepare, seqkd, student, train
from pipeline.stages.train import TrainPlan


def planned(folder: Path, *overrides: str, run_dir: Path | None = None, **changes: Any) -> Plan:
    """The plan of the tiny experiment under `folder`."""
    path = experiment.write(folder, **changes)
    return plan_experiment(load_experiment(path, overrides), run_dir or folder / "runs")


def run_inputs(plan: Plan) -> Plan:
    """Run everything that training needs."""
    prepare.run(plan.data)
    student.run(plan.student)
    if plan.cache is not None:
        cache.run(plan.cache)
    for generation in plan.generations:
        seqkd.run(generation)
    return plan


def run_trials(plan: Plan) -> None:
    """Train and evaluate every trial; a model is loaded only where an evaluation is missing."""
    for trial in plan.trials:
        if trial.train is not None:
            train.run(trial.train)
        jobs = [job for job in trial.evaluations if job.place.existing() is None]
        if jobs:
            loaded = evaluate.load_subject(jobs[0].subject)
            for job in jobs:
                evaluate.run(job, loaded)


def training(plan: Plan, method: str, seed: int = 10) -> TrainPlan:
    """The plan of one training run."""
    return next(t.train for t in plan.trials if t.train is not None and (t.method, t.seed) == (method, seed))
