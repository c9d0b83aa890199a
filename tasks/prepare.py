"""Task: tokenise rows."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import prepare as stage
from pipeline.stages.prepare import BenchmarkPlan, TrainingDataPlan
from pipeline.tracking import Tracker
from pipeline.trial import data_input
from tasks.record import show_artifact, track_stage


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def prepare(plan: TrainingDataPlan | BenchmarkPlan, experiment: str, tracker: Tracker) -> str:
    """Tokenise training rows or one benchmark; returns the stage run's id."""
    if isinstance(plan, TrainingDataPlan):
        artifact = stage.run(plan)
        parts = (("train", plan.train, "training"), ("dev", plan.dev, "validation"))
        inputs = [data_input(rows, name, artifact.manifest.counts[name]["kept"], use) for name, rows, use in parts]
    else:
        artifact = stage.run_benchmark(plan)
        inputs = [data_input(plan.rows, plan.name, artifact.manifest.counts["kept"], "evaluation")]
    show_artifact(plan.place, artifact)
    return track_stage(tracker, experiment, plan.place, artifact, inputs)
