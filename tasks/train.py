"""Task: train one student."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import train as stage
from pipeline.stages.fit import METRICS
from pipeline.stages.place import MODEL
from pipeline.stages.train import TrainPlan
from pipeline.tracking import Tracker
from tasks.record import show_artifact


@task(task_run_name="{plan.place.label}", cache_policy=NO_CACHE)
def train(plan: TrainPlan, run_id: str, tracker: Tracker) -> str:
    """Train and ship the curves to the trial's run; returns the artifact's folder."""
    artifact = stage.run(plan, follow=tracker.follow(run_id))
    tracker.log_steps(run_id, artifact.path / METRICS)
    counts = artifact.manifest.counts
    tracker.log_metrics(
        run_id,
        {
            "cost/train_seconds": counts["seconds"],
            "cost/tokens_per_second": counts["tokens"] / max(counts["seconds"], 1e-9),
            "cost/peak_memory_gib": counts["peak_memory_gib"],
            "train/best_step": counts["best_step"],
        },
    )
    tracker.set_tags(
        run_id,
        {
            "checkpoint": str(artifact.path / MODEL),
            "fingerprint.train": plan.place.fingerprint,
            "learning_rate": f"{counts['learning_rate']:g}",
        },
    )
    show_artifact(plan.place, artifact)
    return str(artifact.path)
