"""Task: score one model on every benchmark."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages.compare import Trial
from pipeline.tracking import Tracker
from pipeline.trial import evaluate_tracked
from tasks.record import show_artifact


@task(task_run_name="evaluate {trial.name}", cache_policy=NO_CACHE)
def evaluate(trial: Trial, run_id: str, tracker: Tracker) -> None:
    """Generate, score and measure; scores and generations go to the trial's run."""
    for place, artifact in evaluate_tracked(trial, run_id, tracker):
        show_artifact(place, artifact)
