"""Task: compare a student with its teacher layer by layer."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import lens_profile as stage
from pipeline.stages.lens_profile import LensProfilePlan
from pipeline.tracking import Tracker
from tasks.record import show_artifact


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def profile_lens(plan: LensProfilePlan, run_id: str, tracker: Tracker) -> str:
    """Profile the student and log what each layer comes to; returns the artifact's folder."""
    artifact = stage.run(plan)
    show_artifact(plan.place, artifact)
    values: dict[str, float] = {}
    for layer in stage.read_profile(plan):
        name = f"lens/layer_{layer.student_layer:02d}"
        values |= {
            f"{name}/jsd": layer.jsd,
            f"{name}/over_confident_mass": layer.over_confident_mass,
            f"{name}/under_confident_mass": layer.under_confident_mass,
            f"{name}/top1_agreement": layer.top1_agreement,
        }
    tracker.log_metrics(run_id, values)
    return str(artifact.path)
