"""Task: let the teacher write responses to the training prompts."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import seqkd as stage
from pipeline.stages.seqkd import SeqKdPlan
from pipeline.tracking import Tracker
from tasks.record import show_artifact, track_stage


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def generate(plan: SeqKdPlan, experiment: str, tracker: Tracker) -> str:
    """Write the rows of sequence-level KD; returns the stage run's id."""
    artifact = stage.run(plan)
    show_artifact(plan.place, artifact)
    return track_stage(tracker, experiment, plan.place, artifact)
