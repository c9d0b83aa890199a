"""Running stages of a tiny experiment one after another, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import experiment

from pipeline.config import load_experiment
from pipeline.plan import Plan, plan_experiment
from pipeline.reporting import notes
from pipeline.reporting.record import TrainingRecord
from pipeline.reporting.report import settings_of
from pipeline.stages import cache, evaluate, prepare, report, seqkd, student, train
from pipeline.stages.compare import ComparePlan, Trial
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


def method_settings(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Method → every setting that it is trained with and that a method can have of its own, by dotted path."""
    runs: dict[str, list[TrainingRecord]] = {}
    for trial in trials:
        if trial.train is not None:
            runs.setdefault(trial.row, []).append(report.training_record(trial.train))
    return settings_of(runs)


def reading_notes(plan: ComparePlan) -> list[str]:
    """What the report says below its table, before anything is run."""
    return notes.reading_notes(report.planned(plan))
