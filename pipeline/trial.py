"""One trial: train, evaluate, profile, and tell the tracker. The same for a flow's tasks and for a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from pipeline.artifacts import Artifact, canonical_json, text_digest
from pipeline.plan import Plan
from pipeline.registering import TRAINING, VALIDATION
from pipeline.stages import evaluate, lens_profile, measure, train
from pipeline.stages.compare import Trial, git_commit, trial_rows
from pipeline.stages.evaluate import LoadedModel, ServedModel
from pipeline.stages.fit import METRICS
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.lens_profile import LensProfilePlan
from pipeline.stages.place import MODEL, Place, obtain
from pipeline.stages.prepare import RowsPlan
from pipeline.stages.train import TrainPlan
from pipeline.tracking import DataInput, RunFacts, Tracker, flatten, run_reference, tracked

_TABLE_ROWS = 200


def run_trial(plan: Plan, trial: Trial, config: Path, tracker: Tracker, stage_runs: Mapping[str, str]) -> bool:
    """Do what is missing of a trial, as one flat run; its inputs must be there.

    Args:
        plan: the experiment that it belongs to.
        trial: the trial.
        config: where that experiment is written down.
        tracker: told everything.
        stage_runs: stage → tracked run that made its inputs.

    Returns:
        Whether there was anything to do.
    """
    if is_told(trial, tracker):
        return False
    run_id = tracker.start(trial_facts(plan, trial, stage_runs))
    with tracked(tracker, run_id):
        if trial.train is not None:
            train_tracked(trial.train, run_id, tracker)
        evaluate_tracked(trial, run_id, tracker)
        if trial.profile is not None:
            profile_tracked(trial.profile, run_id, tracker)
        finish_trial(trial, config, run_id, tracker, stage_runs, plan.experiment.tracking.log_models)
    return True


def is_told(trial: Trial, tracker: Tracker) -> bool:
    """Whether a trial is finished and the tracker was told all of it."""
    return trial.finished() and tracker.told(trial_key(trial)) is not None


def trial_facts(plan: Plan, trial: Trial, stage_runs: Mapping[str, str]) -> RunFacts:
    """Name, settings, labels and data sets of a trial."""
    experiment = plan.experiment
    params: dict[str, Any] = {"method": trial.method}
    if not isinstance(trial.evaluations[0].subject, ModelPlan):
        params |= {"student": plan.student.label, "student_layers": plan.student.layers}
    if trial.train is not None:
        params |= {"train_seed": trial.seed, "alpha": trial.train.alpha}
        params |= flatten(trial.train.config.model_dump(mode="json", exclude={"alpha", "train"}), "method.")
        # Only what a result depends on: a column for anything else would be noise, and config.yaml has it all.
        params |= flatten(trial.train.place.recipe["training"], "train.")
    fingerprints = _scored(trial)
    inputs = []
    if trial.train is not None:
        rows = plan.data.place.open().manifest.counts["train"]["kept"]
        inputs.append(data_input(plan.data.train, "train", rows, "training"))
    inputs += [data_input(b.rows, b.name, b.place.open().manifest.counts["kept"], "evaluation") for b in plan.benchmarks]
    return RunFacts(
        key=trial_key(trial),
        name=trial.name,
        experiment=experiment.name,
        params=params,
        tags={
            "stage": "trial",
            "method": trial.method,
            "row": trial.row,
            "family": str(plan.models[0].config().model_type),
            "teacher": plan.models[0].location.label,
            "config_fingerprint": text_digest(canonical_json(experiment.model_dump(mode="json", exclude={"tracking"})))[:16],
            "git_commit": git_commit() or "unknown",
            "experiment_fingerprint": plan.comparison.place.fingerprint,
            **{f"stage_run.{stage}": run_reference(run_id) for stage, run_id in stage_runs.items()},
            **{f"fingerprint.evaluate.{benchmark}": value for benchmark, value in fingerprints.items()},
        },
        inputs=inputs,
    )


def trial_key(trial: Trial) -> str:
    """What identifies a trial to a tracker: its name and everything that it leads to."""
    return text_digest(repr([trial.name, trial.train and trial.train.place.fingerprint, sorted(_scored(trial).items())]))[:16]


def wall_seconds(trial: Trial) -> float:
    """How long everything of a trial took, from the manifests: training, evaluations, metrics and profile."""
    artifacts = [place.existing() for place in trial.places]
    return sum(artifact.manifest.seconds for artifact in artifacts if artifact is not None)


def _scored(trial: Trial) -> dict[str, str]:
    """Evaluations, metrics and profile by name → fingerprint."""
    fingerprints = {plan.benchmark.name: plan.place.fingerprint for plan in trial.evaluations}
    fingerprints |= {f"{plan.evaluation.benchmark.name} {plan.name}": plan.place.fingerprint for plan in trial.metrics}
    if trial.profile is not None:
        fingerprints["lens profile"] = trial.profile.place.fingerprint
    return fingerprints


def data_input(rows: RowsPlan, name: str, count: int, context: str) -> DataInput:
    """Rows as a tracked data set: the digest covers the file's content and the part that was taken from it."""
    return DataInput(name, text_digest(canonical_json(rows.identity())), rows.describe(), count, context)


def train_tracked(plan: TrainPlan, run_id: str, tracker: Tracker) -> Artifact:
    """Train and ship the curves."""
    artifact = train.run(plan, follow=tracker.follow(run_id))
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
            TRAINING: plan.place.fingerprint,
            # What its dev scores depend on besides the student.
            VALIDATION: text_digest(canonical_json([plan.place.recipe["validation"], plan.place.upstream["prepare"]]))[:16],
            "learning_rate": f"{counts['learning_rate']:g}",
        },
    )
    return artifact


def evaluate_tracked(trial: Trial, run_id: str, tracker: Tracker) -> list[tuple[Place, Artifact]]:
    """Generate, score and measure, loading the model once and only if something is missing; ships scores and generations."""

    @cache
    def load() -> LoadedModel:
        return evaluate.load_subject(trial.evaluations[0].subject)

    @cache
    def answering() -> LoadedModel | ServedModel:
        first = trial.evaluations[0]
        return load() if first.evaluation.engine == "transformers" else evaluate.load_served(first.subject)

    made = []
    for plan in trial.evaluations:
        artifact = obtain(plan.place) or evaluate.run(plan, answering())
        made.append((plan.place, artifact))
        rows = parquet.read_table(artifact.path / evaluate.GENERATIONS).slice(0, _TABLE_ROWS).to_pydict()
        rows["references"] = ["\n---\n".join(references) for references in rows["references"]]
        tracker.log_table(run_id, rows, f"generations/{plan.benchmark.name}.json")
    made += [(metric.place, measure.run(metric, load)) for metric in trial.metrics]
    scores: dict[str, float] = {}
    for row in trial_rows(trial):
        scores[f"eval/{row.benchmark}/{row.metric}"] = row.mean
        if row.std is not None:
            scores[f"eval/{row.benchmark}/{row.metric}_decoding_std"] = row.std
    tracker.log_metrics(run_id, scores)
    return made


def profile_tracked(plan: LensProfilePlan, run_id: str, tracker: Tracker) -> Artifact:
    """Compare the student with its teacher layer by layer, and ship what each layer comes to."""
    artifact = lens_profile.run(plan)
    values: dict[str, float] = {}
    for layer in lens_profile.read_profile(plan):
        name = f"lens/layer_{layer.student_layer:02d}"
        values |= {
            f"{name}/jsd": layer.jsd,
            f"{name}/over_confident_mass": layer.over_confident_mass,
            f"{name}/under_confident_mass": layer.under_confident_mass,
            f"{name}/top1_agreement": layer.top1_agreement,
        }
    tracker.log_metrics(run_id, values)
    return artifact


def finish_trial(
    trial: Trial, config: Path, run_id: str, tracker: Tracker, stage_runs: Mapping[str, str], log_model: bool
) -> None:
    """Ship the configuration file, the whole time and the student, link the stages' runs back, and close the run."""
    tracker.log_metrics(run_id, {"cost/wall_seconds": wall_seconds(trial)})
    tracker.log_files(run_id, [config], "config")
    if log_model and trial.train is not None:
        tracker.log_model(run_id, trial.train.place.path / MODEL, trial.name)
    for stage_run in stage_runs.values():
        tracker.link(run_id, stage_run, f"trial.{trial.name}")
    tracker.finish(run_id, "FINISHED")
