"""Task: train one student."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages.train import TrainPlan
from pipeline.tracking import Tracker
from pipeline.trial import train_tracked
from tasks.record import show_artifact


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def train(plan: TrainPlan, run_id: str, tracker: Tracker) -> str:
    """Train and ship the curves to the trial's run; returns the artifact's folder."""
    artifact = train_tracked(plan, run_id, tracker)
    show_artifact(plan.place, artifact)
    return str(artifact.path)
