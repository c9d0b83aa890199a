"""Task: make a model reference usable."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import import_model as stage
from pipeline.stages.import_model import ModelPlan
from tasks.record import show_artifact


@task(task_run_name="import {plan.what}", cache_policy=NO_CACHE)
def import_model(plan: ModelPlan) -> str:
    """Convert or download the model; returns its folder."""
    folder = stage.run(plan)
    if plan.place is not None:
        show_artifact(plan.place, plan.place.open())
    return str(folder)
