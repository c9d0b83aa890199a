"""Task: make the untrained student."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import student as stage
from pipeline.stages.student import StudentPlan
from pipeline.tracking import Tracker
from tasks.record import show_artifact, track_stage


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def initialise_student(plan: StudentPlan, experiment: str, tracker: Tracker) -> str:
    """Prune, load or create the student; returns the stage run's id."""
    artifact = stage.run(plan)
    show_artifact(plan.place, artifact)
    return track_stage(tracker, experiment, plan.place, artifact)
