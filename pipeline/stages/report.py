"""What a report needs of an experiment: its plans as records, with what their artifacts say; and where it is written."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

import pipeline
from pipeline.artifacts import Artifact, fingerprint
from pipeline.config.methods import TASK_OF_KIND, Metrics, Training
from pipeline.data.prompts import holds_special_tokens
from pipeline.data.tokenize import read_encoded, read_prompts
from pipeline.models.load import load_tokenizer
from pipeline.reporting.aggregate import RunScores
from pipeline.reporting.differences import ABSENT
from pipeline.reporting.overlap import Overlap, Seen, overlap, seen
from pipeline.reporting.published import published
from pipeline.reporting.record import (
    DATA,
    DataRecord,
    EvaluationRecord,
    ExperimentRecord,
    Facts,
    Generations,
    InputRecord,
    Measured,
    MetricRecord,
    Prompt,
    Records,
    RowCounts,
    SharedWork,
    TrainingRecord,
    TrainingRun,
    TrialRecord,
)
from pipeline.reporting.record_files import SCORED
from pipeline.reporting.report import CURVES
from pipeline.stages import evaluate, measure, train
from pipeline.stages.evaluate import GENERATIONS, EvaluatePlan, read_scores
from pipeline.stages.fit import METRICS
from pipeline.stages.lens_profile import read_profile, read_profile_heat
from pipeline.stages.measure import MetricPlan
from pipeline.stages.place import MODEL, Place, obtain
from pipeline.stages.prepare import DEV_PROMPTS, PROMPTS, TRAIN, BenchmarkPlan
from pipeline.stages.student import StudentPlan
from pipeline.stages.train import TrainPlan
from pipeline.tracking import flatten

if TYPE_CHECKING:
    from pipeline.stages.compare import ComparePlan, Trial


def planned(plan: ComparePlan) -> Facts:
    """What is known of an experiment before anything of it has run."""
    experiment, identity = plan.experiment, plan.place.fingerprint
    record = ExperimentRecord(
        experiment.name, experiment.name, experiment.description, identity, experiment.fair, _budget(experiment.train),
        _metrics(plan.trials, experiment.evaluation.metrics), list(published(experiment).values()),
    )  # fmt: skip
    trials = [_trial(trial, identity) for trial in plan.trials]
    data = [DataRecord(run.data.place.fingerprint, run.data.config.max_tokens, None, {}) for run in _data(plan.trials).values()]
    return Facts([record], trials, data, plan.baseline, plan.missing_baseline)


def measured(plan: ComparePlan, scores: Sequence[RunScores]) -> Records:
    """Everything that the report is made from; the evaluations must be there.

    Args:
        plan: the comparison.
        scores: of every trial on every benchmark, in order.
    """
    facts, found = planned(plan), iter(scores)
    trials = [_with_results(trial, record, found) for trial, record in zip(plan.trials, facts.trials, strict=True)]
    benchmarks = {own.benchmark.place.fingerprint: own.benchmark for trial in plan.trials for own in trial.evaluations}
    data = [_data_record(run, list(benchmarks.values())) for run in _data(plan.trials).values()]
    experiments = [replace(facts.experiments[0], written=here())]
    return Records(replace(facts, experiments=experiments, trials=trials, data=data), _generations(plan.trials))


def training_record(plan: TrainPlan) -> TrainingRecord:
    """How a model is trained, and what that took as far as its artifacts are here."""
    data, teacher = plan.data, plan.teacher
    recipe = {name: value for name, value in plan.place.recipe.items() if name != "seed"}
    return TrainingRecord(
        label=plan.place.label,
        fingerprint=plan.place.fingerprint,
        family=fingerprint("train", train.VERSION, recipe, plan.place.upstream),
        settings=_settings(plan),
        searched=len(plan.training.learning_rates) > 1,
        own_batches=plan.generated is not None,
        inputs=[
            InputRecord(DATA, Path(data.train.describe()).name, data.place.label, data.place.fingerprint),
            InputRecord("student", _student_name(plan.student), plan.student.place.label, plan.student.place.fingerprint),
            InputRecord("teacher", teacher.location.label, "teacher", teacher.digest[:16]),
        ],
        asks_teacher=plan.alpha > 0 or plan.generated is not None,
        run=_run(plan),
        shared=_shared(plan),
    )


def here() -> dict[str, str]:
    """Code and machine that write a report now."""
    commit = git_commit() or "not in a git checkout"
    return {"git commit": commit, "pipeline": pipeline.__version__, "report written on": _machine()}


def git_commit() -> str | None:
    """Commit of the code that runs, with "+changes" if the checkout differs from it."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _trial(trial: Trial, origin: str) -> TrialRecord:
    training = None if trial.train is None else training_record(trial.train)
    model = str(trial.evaluations[0].place.upstream["model"])
    evaluations = [_evaluation(plan) for plan in trial.evaluations]
    return TrialRecord(trial.method, trial.variant, trial.seed, trial.row, [origin], model, training, evaluations)


def _evaluation(plan: EvaluatePlan) -> EvaluationRecord:
    where, prompts = plan.place, plan.place.upstream["benchmark"]
    conditions = fingerprint("evaluate", evaluate.VERSION, where.recipe, {"benchmark": prompts})
    return EvaluationRecord(plan.benchmark.name, where.label, where.fingerprint, conditions, prompts, plan.protocol())


def _metrics(trials: Sequence[Trial], settings: Metrics) -> list[MetricRecord]:
    notes = _metric_notes(settings)
    plans: dict[str, MetricPlan] = {}
    for trial in trials:
        for plan in trial.metrics:
            plans.setdefault(plan.name, plan)
    return [MetricRecord(name, note, _metric_conditions(plans[name])) for name, note in notes.items() if name in plans]


def _metric_conditions(plan: MetricPlan) -> str:
    """Of how it is measured, whatever the model and the benchmark."""
    encoder = {name: value for name, value in plan.place.upstream.items() if name == "encoder"}
    return fingerprint("metric", measure.VERSION, plan.place.recipe, encoder)


def _metric_notes(metrics: Metrics) -> dict[str, str]:
    notes = {}
    if metrics.similarity is not None:
        notes["similarity"] = "100 · cosine of sentence embeddings of the prediction and its closest reference."
    if metrics.exposure_bias is not None:
        notes["ex_acc_err"] = (
            f"excess accumulated error after {metrics.exposure_bias.lengths[-1]} tokens on the student's own "
            "responses over the teacher's, per cent; 0 without exposure bias."
        )
    if metrics.calibration:
        notes["ece"] = "expected calibration error of the next-token predictions on the references, per cent; lower is better."
    if metrics.judge is not None:
        notes["judge"] = (
            f"mean rating by {metrics.judge.model}, 1 (useless) to 10 (excellent), with the first reference beside."
        )
    return notes


def _budget(training: Training) -> str:
    if training.max_steps is not None:
        length = f"{training.max_steps} step{'s' if training.max_steps != 1 else ''}"
    else:
        length = f"{training.epochs:g} epoch{'s' if training.epochs != 1 else ''}"
    rates = training.learning_rates
    peak = (
        f"peak learning rate {rates[0]:g}"
        if len(rates) == 1
        else f"a search over the peak learning rates {', '.join(f'{rate:g}' for rate in rates)}"
    )
    return f"{length} of {training.batch_size} rows, {peak}"


def _settings(plan: TrainPlan) -> dict[str, Any]:
    config = plan.config
    given = config.model_dump(mode="json", exclude={"alpha", "train"})
    own = flatten({name: value for name, value in given.items() if (name, value) != ("on_policy", None)})
    budget = flatten(plan.training.model_dump(mode="json", exclude={"seeds"}), "train.")
    states = "none" if plan.alpha == 0 else f"{plan.cache.dtype} cache" if plan.cache else "online"
    return {
        "kind": own.pop("kind"),
        "alpha": plan.alpha,
        "task": TASK_OF_KIND.get(config.kind, ABSENT),
        **own,
        "training responses": "references" if plan.generated is None else "teacher's",
        "teacher states": states,
        **budget,
    }


def _student_name(plan: StudentPlan) -> str:
    made = plan.config.kind if plan.own is None else plan.own.location.label
    return f"{made}, {plan.layers} layers"


def _with_results(trial: Trial, record: TrialRecord, scores: Iterator[RunScores]) -> TrialRecord:
    evaluations = []
    for plan, own in zip(trial.evaluations, record.evaluations, strict=True):
        about = read_scores(plan.place.path)
        per_seed = {metric: list(values) for metric, values in next(scores).per_seed.items()}
        evaluations.append(replace(own, measured=Measured(about["rows"], about["share_cut"], per_seed)))
    seen = trial.profile
    return replace(
        record, evaluations=evaluations, profile=None if seen is None else read_profile(seen),
        heat=None if seen is None else read_profile_heat(seen),
    )  # fmt: skip


def _run(plan: TrainPlan) -> TrainingRun | None:
    artifact = plan.place.existing()
    if artifact is None:
        return None
    counts = artifact.manifest.counts
    return TrainingRun(
        float(counts["seconds"]), counts["steps"], counts["tokens"], float(counts["peak_memory_gib"]), counts["best_step"],
        float(counts["learning_rate"]), dict(sorted(artifact.manifest.versions.items())), _curves(artifact),
    )  # fmt: skip


def _curves(artifact: Artifact) -> dict[str, list[tuple[int, float]]]:
    file = artifact.path / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    curves = {name: [(own["step"], own["metrics"][name]) for own in records if name in own["metrics"]] for name in CURVES}
    return {name: [(step, value) for step, value in curve if math.isfinite(value)] for name, curve in curves.items()}


def _shared(plan: TrainPlan) -> list[SharedWork]:
    """Work whose result several runs share, from the manifests that are here."""
    places = [own.place for own in (plan.cache, plan.generated) if own is not None]
    return [SharedWork(place.label, place.fingerprint, seconds) for place in places if (seconds := _seconds(place)) is not None]


def _seconds(place: Place) -> float | None:
    artifact = place.existing()
    return None if artifact is None else artifact.manifest.seconds


def _generations(trials: Sequence[Trial]) -> Generations:
    """Scores of all trials, texts of the first training seed of each row under the first decoding seed."""
    tables: dict[str, pa.Table] = {}
    prompts: dict[str, dict[str, Prompt]] = {}
    shown: set[str] = set()
    for trial in trials:
        for plan in trial.evaluations:
            if trial.row in shown:
                columns = [name for name in SCORED.names if name != "prediction"]
                table = parquet.read_table(plan.place.path / GENERATIONS, columns=columns)
                texts = pa.nulls(len(table), pa.string())
            else:
                table = parquet.read_table(plan.place.path / GENERATIONS)
                first = pc.equal(table["seed"], table["seed"][0])
                texts = pc.if_else(first, table["prediction"], None)
                own = prompts.setdefault(plan.benchmark.place.fingerprint, {})
                for row in table.filter(first).select(["id", "prompt", "references"]).to_pylist():
                    own[row["id"]] = Prompt(row["prompt"], row["references"])
            scores = table.select([name for name in SCORED.names if name != "prediction"])
            tables[plan.place.fingerprint] = scores.append_column("prediction", texts)
        shown.add(trial.row)
    return Generations(tables, prompts)


def _data(trials: Sequence[Trial]) -> dict[str, TrainPlan]:
    """Fingerprint of training data → a run on it."""
    found: dict[str, TrainPlan] = {}
    for trial in trials:
        if trial.train is not None:
            found.setdefault(trial.train.data.place.fingerprint, trial.train)
    return found


def _data_record(run: TrainPlan, benchmarks: Sequence[BenchmarkPlan]) -> DataRecord:
    rows = obtain(run.data.place)
    known = None if rows is None else _seen(run, rows)
    overlaps = {benchmark.place.fingerprint: _overlaps(run, benchmark, known) for benchmark in benchmarks}
    made = None if rows is None else rows.manifest.counts["train"]
    counts = None if made is None else RowCounts(**{name: made[name] for name in RowCounts.__dataclass_fields__})
    return DataRecord(run.data.place.fingerprint, run.data.config.max_tokens, counts, overlaps)


def _overlaps(run: TrainPlan, benchmark: BenchmarkPlan, known: dict[str, Seen] | None) -> list[Overlap] | None:
    prompts = obtain(benchmark.place)
    if known is None or prompts is None:
        return None
    asked = _texts(run, benchmark.template, [row.input_ids for row in read_prompts(prompts.path / PROMPTS)])
    return [overlap(benchmark.name, asked, part, others) for part, others in known.items()]


def _seen(run: TrainPlan, rows: Artifact) -> dict[str, Seen]:
    """Prompts of the training and the dev rows."""
    train_rows = [row.input_ids[: row.prompt_tokens] for row in read_encoded(rows.path / TRAIN)]
    dev = [prompt.input_ids for prompt in read_prompts(rows.path / DEV_PROMPTS)]
    return {part: seen(_texts(run, run.data.config.template, ids)) for part, ids in (("training", train_rows), ("dev", dev))}


def _texts(run: TrainPlan, template: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    # Both sides are decoded from their ids, so that what a tokenizer changes it changes on both.
    tokenizer = load_tokenizer(run.place.path / MODEL)
    skip = not holds_special_tokens(template)
    return [str(tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)) for ids in prompts]


def _machine() -> str:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join(
        [platform.machine(), platform.system(), f"{os.cpu_count()} CPUs", f"{memory:.0f} GiB memory", *(devices or ["no GPU"])]
    )
