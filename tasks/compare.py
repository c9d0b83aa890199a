"""Task: put every evaluation into one comparison."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.artifacts import MANIFEST
from pipeline.gallery import track_comparison
from pipeline.stages import compare as stage
from pipeline.stages.compare import ComparePlan
from pipeline.tracking import Tracker, stage_experiment
from tasks.pages import show_page
from tasks.record import track_stage


@task(task_run_name="compare", cache_policy=NO_CACHE)
def compare(plan: ComparePlan, tracker: Tracker) -> str:
    """Write the comparison; returns its folder."""
    artifact = stage.run(plan)
    table = (artifact.path / "table.md").read_text(encoding="utf-8")
    show_page(f"comparison-{plan.place.fingerprint}", plan.experiment.name, table)

    def more(run_id: str) -> None:
        files = [file for file in sorted(artifact.path.iterdir()) if file.name != MANIFEST]
        tracker.log_files(run_id, files, "comparison")
        track_comparison(plan, artifact, run_id, stage_experiment(plan.experiment.name), tracker)

    track_stage(tracker, plan.experiment.name, plan.place, artifact, more=more)
    return str(artifact.path)
