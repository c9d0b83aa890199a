"""Task: compare a student with its teacher layer by layer."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages.lens_profile import LensProfilePlan
from pipeline.tracking import Tracker
from pipeline.trial import profile_tracked
from tasks.record import show_artifact


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def profile_lens(plan: LensProfilePlan, run_id: str, tracker: Tracker) -> str:
    """Profile the student and log what each layer comes to; returns the artifact's folder."""
    artifact = profile_tracked(plan, run_id, tracker)
    show_artifact(plan.place, artifact)
    return str(artifact.path)
