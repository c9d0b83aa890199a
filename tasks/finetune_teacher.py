"""Task: fine-tune the teacher."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import finetune_teacher as stage
from pipeline.stages.finetune_teacher import FinetunePlan
from pipeline.stages.fit import METRICS
from pipeline.tracking import Tracker
from tasks.record import show_artifact, track_stage


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def finetune_teacher(plan: FinetunePlan, experiment: str, tracker: Tracker) -> str:
    """Fine-tune the teacher and ship the curves; returns the stage run's id."""
    artifact = stage.run(plan)
    show_artifact(plan.place, artifact)
    return track_stage(
        tracker, experiment, plan.place, artifact, more=lambda run_id: tracker.log_steps(run_id, artifact.path / METRICS)
    )
