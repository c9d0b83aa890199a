"""Stage 5: every evaluation of an experiment in one comparison."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, write_text_atomically
from pipeline.config.experiment import Experiment
from pipeline.config.methods import TASK_OF_KIND, Metrics, Training
from pipeline.evaluation.lens_profile import write_profiles
from pipeline.reporting import render
from pipeline.reporting.aggregate import METRICS, ResultRow, RunScores, result_rows, table
from pipeline.reporting.differences import ABSENT, differences, write_csv
from pipeline.stages.evaluate import GENERATIONS, EvaluatePlan, read_scores
from pipeline.stages.lens_profile import LensProfilePlan, read_profile
from pipeline.stages.measure import MetricPlan, read_metric
from pipeline.stages.place import Place, build, place
from pipeline.stages.train import TrainPlan
from pipeline.tracking import flatten

VERSION = 2
_EXAMPLES_PER_BENCHMARK = 2


@dataclass(frozen=True)
class Trial:
    """A row of the comparison: one model.

    Attributes:
        method: the method's name, "teacher" or "untrained".
        seed: training seed, None for models that are not trained here.
        train: its training, None for models that are not trained here.
        evaluations: one per benchmark.
        metrics: what is measured on their generations.
        profile: its lens profile, None where there is none.
    """

    method: str
    seed: int | None
    train: TrainPlan | None
    evaluations: tuple[EvaluatePlan, ...]
    metrics: tuple[MetricPlan, ...] = ()
    profile: LensProfilePlan | None = None

    def finished(self) -> bool:
        """Whether every artifact of it is there."""
        made = (*self.evaluations, *self.metrics, self.train, self.profile)
        return all(plan.place.existing() is not None for plan in made if plan is not None)

    @property
    def name(self) -> str:
        """Short name for people: `distilllens s10`."""
        return self.method if self.seed is None else f"{self.method} s{self.seed}"


@dataclass(frozen=True)
class ComparePlan:
    """The comparison of an experiment, at RUN_DIR/NAME/comparison."""

    place: Place
    experiment: Experiment
    trials: tuple[Trial, ...]


def plan_comparison(experiment: Experiment, trials: Sequence[Trial], root: Path, run_dir: Path) -> ComparePlan:
    """Plan the comparison; it is rebuilt when any evaluation behind it changes."""
    upstream = {f"{trial.name}/{plan.benchmark.name}": plan.place.fingerprint for trial in trials for plan in trial.evaluations}
    upstream |= {
        f"{trial.name}/{plan.evaluation.benchmark.name}/{plan.name}": plan.place.fingerprint
        for trial in trials
        for plan in trial.metrics
    }
    upstream |= {f"{trial.name}/lens": trial.profile.place.fingerprint for trial in trials if trial.profile is not None}
    recipe = {"name": experiment.name, "description": experiment.description, "fair": experiment.fair}
    path = run_dir / experiment.name / "comparison"
    return ComparePlan(place(root, "compare", VERSION, "compare", recipe, upstream, path), experiment, tuple(trials))


def run(plan: ComparePlan) -> Artifact:
    """Write results.csv, differences.csv, table.md, report.html and, where there are lens profiles, their figures."""

    def work(folder: Path) -> Mapping[str, Any]:
        rows = result_rows(trial_scores(plan.trials))
        cells = table(rows)
        render.write_csv(folder / "results.csv", rows)
        write_text_atomically(folder / "table.md", render.markdown_table(cells))
        settings = method_settings(plan.trials)
        differing = differences(settings)
        write_csv(folder / "differences.csv", differing, list(settings))
        extra = dict.fromkeys(row.metric for row in rows if row.metric not in METRICS)
        page = render.Page(
            name=plan.experiment.name,
            description=plan.experiment.description,
            notes=reading_notes(plan),
            others={metric: table(rows, metric) for metric in extra},
            costs=_costs(plan.trials),
            differences=differing,
            figures=_lens_figures(plan.trials, folder),
            examples=_examples(plan.trials),
            provenance=_provenance(plan),
        )
        write_text_atomically(folder / "report.html", render.html_page(cells, page))
        return {"rows": len(rows), "trials": len(plan.trials)}

    return build(plan.place, work, replace=True)


def trial_scores(trials: Sequence[Trial]) -> list[RunScores]:
    """The scores behind the comparison."""
    return [_run_scores(trial, plan) for trial in trials for plan in trial.evaluations]


def trial_rows(trial: Trial) -> list[ResultRow]:
    """results.csv rows of one trial."""
    return result_rows(trial_scores([trial]))


def _lens_figures(trials: Sequence[Trial], folder: Path) -> list[render.Picture]:
    """lens_profile.json and its figures, for the trials that have a profile."""
    profiles = {trial.name: read_profile(trial.profile) for trial in trials if trial.profile is not None}
    if not profiles:
        return []
    from pipeline.reporting import lens_figure

    write_profiles(folder / "lens_profile.json", profiles)
    drawn = {
        "lens_divergence": (lens_figure.divergence_figure(profiles), "Divergence to the teacher at every mapped layer"),
        "lens_confidence": (lens_figure.confidence_figure(profiles), "Over- and under-confidence at every mapped layer"),
    }
    return [render.Picture(title, lens_figure.save(figure, folder / name)[1]) for name, (figure, title) in drawn.items()]


def method_settings(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Method → every setting that it was trained with and that a method can have of its own, by dotted path."""
    runs: dict[str, list[TrainPlan]] = {}
    for trial in trials:
        if trial.train is not None:
            runs.setdefault(trial.method, []).append(trial.train)
    return {method: {**_settings(plans[0]), **_found_rates(plans)} for method, plans in runs.items()}


def reading_notes(plan: ComparePlan) -> list[str]:
    """How to read the table: what the numbers are, what the deviations are over, what was equal."""
    training = plan.experiment.train
    protocols = list(dict.fromkeys(_decoding_text(evaluation) for evaluation in plan.trials[0].evaluations))
    how = protocols[0] if len(protocols) == 1 else "decoded by each benchmark's own protocol, stored with its scores"
    deviation = (
        f"± is the standard deviation over {len(training.seeds)} training seeds."
        if len(training.seeds) > 1
        else "One training seed: ± in brackets is the standard deviation over decoding seeds of one checkpoint, "
        "which says nothing about the variance of training."
    )
    return [
        f"ROUGE-L F (0–100, higher is better), {how}; avg is the mean over benchmarks.",
        deviation,
        f"Every trained row had {_budget(training)} and the same data order{_other_order(plan)}."
        if plan.experiment.fair
        else "Methods have budgets of their own (fair: false); the report lists every setting in which they differ.",
        *_metric_notes(plan.experiment.evaluation.metrics),
        "teacher and untrained (the student before training) are there for orientation.",
    ]


def _metric_notes(metrics: Metrics) -> list[str]:
    notes = []
    if metrics.similarity is not None:
        notes.append("similarity: 100 · cosine of sentence embeddings of the prediction and its closest reference.")
    if metrics.exposure_bias is not None:
        notes.append(
            f"ex_acc_err: excess accumulated error after {metrics.exposure_bias.lengths[-1]} tokens on the student's own "
            "responses over the teacher's, per cent; 0 without exposure bias."
        )
    if metrics.calibration:
        notes.append(
            "ece: expected calibration error of the next-token predictions on the references, per cent; lower is better."
        )
    if metrics.judge is not None:
        notes.append(
            f"judge: mean rating by {metrics.judge.model}, 1 (useless) to 10 (excellent), with the first reference beside."
        )
    return notes


def _other_order(plan: ComparePlan) -> str:
    """Batches are made of rows of similar length, so other responses are batched otherwise."""
    others = dict.fromkeys(
        trial.method for trial in plan.trials if trial.train is not None and trial.train.generated is not None
    )
    return f" ({', '.join(others)}: in batches by the lengths of the teacher's responses)" if others else ""


def _decoding_text(plan: EvaluatePlan) -> str:
    decoding, count = plan.decoding, len(plan.seeds)
    how = (
        f"sampled at temperature {decoding.temperature:g}, top-p {decoding.top_p:g}, "
        f"{count} decoding seed{'s' if count != 1 else ''}"
        if decoding.do_sample
        else "decoded greedily"
    )
    engine = " by vLLM" if plan.evaluation.engine == "vllm" else ""
    return f"{how}, at most {decoding.max_new_tokens} new tokens{engine}"


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


def _found_rates(plans: Sequence[TrainPlan]) -> dict[str, Any]:
    """The learning rate that the search kept for each training seed."""
    artifacts = [plan.place.existing() for plan in plans if len(plan.training.learning_rates) > 1]
    rates = [f"{artifact.manifest.counts['learning_rate']:g}" for artifact in artifacts if artifact is not None]
    return {"train.learning_rate kept by the search": ", ".join(rates)} if rates else {}


def _run_scores(trial: Trial, plan: EvaluatePlan) -> RunScores:
    scores = read_scores(plan.place.path)
    per_seed = {metric: [float(seed[metric]) for seed in scores["per_seed"]] for metric in METRICS}
    measured = {metric.name: read_metric(metric) for metric in trial.metrics if metric.evaluation == plan}
    per_seed |= {name: values for name, values in measured.items() if values}
    return RunScores(trial.method, trial.seed, plan.benchmark.name, per_seed)


def _costs(trials: Sequence[Trial]) -> dict[str, dict[str, str]]:
    costs = {}
    for trial in trials:
        artifact = trial.train.place.existing() if trial.train else None
        if artifact is not None:
            counts = artifact.manifest.counts
            costs[trial.name] = {
                "steps": str(counts["steps"]),
                "training s": f"{counts['seconds']:.0f}",
                "tokens/s": f"{counts['tokens'] / max(counts['seconds'], 1e-9):.0f}",
                "peak GiB": f"{counts['peak_memory_gib']:.1f}",
                "kept step": str(counts["best_step"]),
                "learning rate": f"{counts['learning_rate']:g}",
            }
    return costs


def _examples(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The first rows of each benchmark under the first decoding seed: a fixed rule, not a choice."""
    import pyarrow.parquet as parquet

    examples: list[dict[str, Any]] = []
    for index, first in enumerate(trials[0].evaluations):
        tables = [
            (trial.name, parquet.read_table(trial.evaluations[index].place.path / GENERATIONS).to_pylist()) for trial in trials
        ]
        rows = tables[0][1]
        ids = list(dict.fromkeys(row["id"] for row in rows))[:_EXAMPLES_PER_BENCHMARK]
        for row_id in ids:
            shown = [(name, next(row for row in found if row["id"] == row_id)) for name, found in tables]
            head = shown[0][1]
            examples.append(
                {
                    "benchmark": first.benchmark.name,
                    "title": head["category"] or row_id,
                    "prompt": head["prompt"],
                    "references": head["references"],
                    "generations": [(name, row["prediction"], row["rouge_l"]) for name, row in shown],
                }
            )
    return examples


def _provenance(plan: ComparePlan) -> dict[str, str]:
    return {
        "experiment fingerprint": plan.place.fingerprint,
        "git commit": git_commit() or "not in a git checkout",
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        **{f"protocol of {e.benchmark.name}": e.protocol_hash for e in plan.trials[0].evaluations},
        **{f"{trial.name}": trial.train.place.fingerprint for trial in plan.trials if trial.train},
    }


def git_commit() -> str | None:
    """Commit of the code that runs, with "+changes" if the checkout differs from it."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
