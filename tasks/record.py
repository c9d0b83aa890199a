"""What a task tells about its artifact: a page in the Prefect UI and a run in the stages' MLflow experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.artifacts import Artifact
from pipeline.stages.place import Place
from pipeline.stages.report import git_commit
from pipeline.tracking import DataInput, RunFacts, Tracker, flatten, stage_experiment
from tasks.pages import show_page


def show_artifact(place: Place, artifact: Artifact) -> None:
    """A page in the Prefect UI: where the artifact is, what it was made from and what it counts."""
    manifest = artifact.manifest
    counts = "\n".join(f"| {name} | {value} |" for name, value in flatten(manifest.counts).items())
    show_page(
        f"{place.stage}-{place.fingerprint}".replace("_", "-"),
        place.label,
        f"`{artifact.path}`\n\nfingerprint `{artifact.fingerprint}`, {manifest.seconds:.1f} s\n\n"
        f"| count | value |\n| --- | --- |\n{counts}\n",
    )


def track_stage(
    tracker: Tracker, experiment: str, place: Place, artifact: Artifact, inputs: Sequence[DataInput] = (),
    more: Callable[[str], None] = lambda run_id: None,
) -> str:  # fmt: skip
    """A run in the stages' experiment, with whatever `more` tells about it; returns its handle, for links from the trials."""
    key = f"{place.stage}/{place.fingerprint}"
    known = tracker.told(key)
    if known is not None:
        return known
    run_id = tracker.start(
        RunFacts(
            key=key,
            name=place.label,
            experiment=stage_experiment(experiment),
            params=flatten(place.recipe),
            tags={
                "stage": place.stage,
                "fingerprint": place.fingerprint,
                "artifact": str(artifact.path),
                "git_commit": git_commit() or "unknown",
                **{f"upstream.{k}": v for k, v in place.upstream.items()},
            },
            inputs=inputs,
        )
    )
    numbers = {name: value for name, value in flatten(artifact.manifest.counts).items() if isinstance(value, (int, float))}
    tracker.log_metrics(run_id, {**numbers, "seconds": artifact.manifest.seconds})
    tracker.log_files(run_id, [artifact.path / "manifest.json"], "stage")
    more(run_id)
    tracker.finish(run_id, "FINISHED")
    return run_id
