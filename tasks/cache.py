"""Task: capture the teacher's states."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import cache as stage
from pipeline.stages.cache import CachePlan
from pipeline.tracking import Tracker
from tasks.record import show_artifact, track_stage


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def cache_teacher(plan: CachePlan, experiment: str, tracker: Tracker) -> str:
    """Capture the states that every student reads; returns the stage run's id."""
    artifact = stage.run(plan)
    show_artifact(plan.place, artifact)
    return track_stage(tracker, experiment, plan.place, artifact)
