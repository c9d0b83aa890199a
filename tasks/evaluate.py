"""Task: score one model on every benchmark."""

from __future__ import annotations

from functools import cache

import pyarrow.parquet as parquet
from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.stages import evaluate as stage
from pipeline.stages import measure
from pipeline.stages.compare import Trial, trial_rows
from pipeline.stages.evaluate import LoadedModel, ServedModel
from pipeline.tracking import Tracker
from tasks.record import show_artifact

_TABLE_ROWS = 200


@task(task_run_name="evaluate {trial.name}", cache_policy=NO_CACHE)
def evaluate(trial: Trial, run_id: str, tracker: Tracker) -> dict[str, float]:
    """Generate and score, loading the model once and only if something is missing; returns the final scores."""

    @cache
    def load() -> LoadedModel:
        return stage.load_subject(trial.evaluations[0].subject)

    @cache
    def answering() -> LoadedModel | ServedModel:
        first = trial.evaluations[0]
        return load() if first.evaluation.engine == "transformers" else stage.load_served(first.subject)

    for plan in trial.evaluations:
        artifact = plan.place.existing() or stage.run(plan, answering())
        show_artifact(plan.place, artifact)
        rows = parquet.read_table(artifact.path / stage.GENERATIONS).slice(0, _TABLE_ROWS).to_pydict()
        rows["references"] = ["\n---\n".join(references) for references in rows["references"]]
        tracker.log_table(run_id, rows, f"generations/{plan.benchmark.name}.json")
    for metric in trial.metrics:
        show_artifact(metric.place, measure.run(metric, load))
    scores: dict[str, float] = {}
    for row in trial_rows(trial):
        scores[f"eval/{row.benchmark}/{row.metric}"] = row.mean
        if row.std is not None:
            scores[f"eval/{row.benchmark}/{row.metric}_decoding_std"] = row.std
    tracker.log_metrics(run_id, scores)
    return scores
