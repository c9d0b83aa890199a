"""Stage 5: every evaluation of an experiment in one comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, write_text_atomically
from pipeline.config.experiment import Experiment
from pipeline.config.methods import TASK_OF_KIND, Metrics, Training
from pipeline.errors import ArtifactError
from pipeline.reporting import examples, exports, render
from pipeline.reporting.aggregate import AVERAGE, METRICS, ResultRow, RunScores, result_rows, table
from pipeline.reporting.differences import ABSENT, differences, write_csv
from pipeline.reporting.published import published
from pipeline.stages import report
from pipeline.stages.evaluate import EvaluatePlan, read_scores
from pipeline.stages.lens_profile import LensProfilePlan
from pipeline.stages.measure import MetricPlan, read_metric
from pipeline.stages.place import Place, build, place
from pipeline.stages.report import git_commit as git_commit
from pipeline.stages.train import TrainPlan
from pipeline.tracking import flatten

VERSION = 4
HEADLINE = "headline.txt"
_BASELINE = "kd"


@dataclass(frozen=True)
class Trial:
    """A row of the comparison: one model.

    Attributes:
        method: the method's name, "teacher" or "untrained".
        variant: what else tells its row from others of the same method, for example "weight=0.5"; empty outside sweeps.
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
    variant: str = ""

    @property
    def places(self) -> list[Place]:
        """Every artifact of it, training first."""
        made = (self.train, *self.evaluations, *self.metrics, self.profile)
        return [plan.place for plan in made if plan is not None]

    def finished(self) -> bool:
        """Whether every artifact of it is there."""
        return all(place.existing() is not None for place in self.places)

    @property
    def row(self) -> str:
        """Its row in the table; trials of a row differ in their training seed alone."""
        return f"{self.method} {self.variant}".strip()

    @property
    def name(self) -> str:
        """Short name for people: `distilllens s10`."""
        return self.row if self.seed is None else f"{self.row} s{self.seed}"


@dataclass(frozen=True)
class ComparePlan:
    """The comparison of an experiment, at RUN_DIR/NAME/comparison.

    Attributes:
        place: the artifact.
        experiment: its settings.
        trials: what is compared.
        baseline: row that the others are compared with, None if nothing was trained.
        missing_baseline: row that was asked for and has no trial, None if there is none such.
    """

    place: Place
    experiment: Experiment
    trials: tuple[Trial, ...]
    baseline: str | None = None
    missing_baseline: str | None = None

    def finished(self) -> bool:
        """Whether exactly this comparison is there."""
        try:
            return self.place.existing() is not None
        except ArtifactError:
            return False  # an older comparison is at its place, or a damaged one: it is rebuilt


def plan_comparison(
    experiment: Experiment, trials: Sequence[Trial], root: Path, run_dir: Path, baseline: str | None = None
) -> ComparePlan:
    """Plan the comparison; it is rebuilt when any evaluation behind it changes.

    Args:
        experiment: its settings.
        trials: finished or planned trials, at least one.
        root: artifact root.
        run_dir: run directory.
        baseline: row or method that the others are compared with; None takes the experiment's, or kd, or the first method.
    """
    upstream = {f"{trial.name}/{plan.benchmark.name}": plan.place.fingerprint for trial in trials for plan in trial.evaluations}
    upstream |= {
        f"{trial.name}/{plan.evaluation.benchmark.name}/{plan.name}": plan.place.fingerprint
        for trial in trials
        for plan in trial.metrics
    }
    upstream |= {f"{trial.name}/lens": trial.profile.place.fingerprint for trial in trials if trial.profile is not None}
    asked = baseline or experiment.baseline
    against = None if asked is None else _row_of(asked, trials)
    missing = asked if against is None else None
    if against is None:
        against = _row_of(_BASELINE, trials) or next((trial.row for trial in trials if trial.train is not None), None)
    recipe = {
        "name": experiment.name, "description": experiment.description, "fair": experiment.fair, "baseline": against,
        "missing_baseline": missing,
    }  # fmt: skip
    path = run_dir / experiment.name / "comparison"
    where = place(root, "compare", VERSION, "compare", recipe, upstream, path)
    return ComparePlan(where, experiment, tuple(trials), against, missing)


def _row_of(name: str, trials: Sequence[Trial]) -> str | None:
    """The row of that name, or the first row of the method of that name."""
    rows = [trial.row for trial in trials if trial.row == name]
    return next(iter(rows or [trial.row for trial in trials if trial.method == name]), None)


def run(plan: ComparePlan) -> Artifact:
    """Write results.csv and .parquet, differences.csv, headline.txt, table.md and .tex, report.html and figures/."""

    def work(folder: Path) -> Mapping[str, Any]:
        rows = result_rows(trial_scores(plan.trials))
        cells = table(rows)
        evidence = report.evidence(plan.trials, plan.baseline)
        standings = evidence.standings or {}
        render.write_csv(folder / "results.csv", rows)
        exports.write_parquet(folder / "results.parquet", rows)
        write_text_atomically(folder / HEADLINE, evidence.headline + "\n")
        write_text_atomically(folder / "table.md", render.markdown_table(cells, standings))
        write_text_atomically(folder / "table.tex", exports.tex_table(cells, standings))
        settings = method_settings(plan.trials)
        differing = differences(settings)
        write_csv(folder / "differences.csv", differing, list(settings))
        extra = dict.fromkeys(row.metric for row in rows if row.metric not in METRICS)
        page = render.Page(
            name=plan.experiment.name,
            description=plan.experiment.description,
            headline=evidence.headline,
            standing=render.standing_text(standings.get(AVERAGE)),
            cells=cells,
            notes=reading_notes(plan),
            orientation=[trial.row for trial in plan.trials if trial.train is None],
            standings=standings,
            published=published(plan.experiment),
            comparison=evidence.comparison,
            others={metric: table(rows, metric) for metric in extra},
            costs=_costs(plan.trials),
            shared_costs=report.shared_costs(plan.trials),
            differences=differing,
            figures=report.draw(plan.trials, evidence, rows, folder),
            examples=report.examples(plan.trials, evidence, plan.baseline),
            rule=examples.RULE if evidence.comparison else examples.DRAWN_RULE,
            limits=report.limits(plan.trials, evidence),
            provenance=report.provenance(plan.trials, plan.place.fingerprint),
        )
        write_text_atomically(folder / "report.html", render.html_page(page))
        return {"rows": len(rows), "trials": len(plan.trials)}

    return build(plan.place, work, replace=True)


def trial_scores(trials: Sequence[Trial]) -> list[RunScores]:
    """The scores behind the comparison."""
    return [_run_scores(trial, plan) for trial in trials for plan in trial.evaluations]


def trial_rows(trial: Trial) -> list[ResultRow]:
    """results.csv rows of one trial."""
    return result_rows(trial_scores([trial]))


def method_settings(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Method → every setting that it was trained with and that a method can have of its own, by dotted path."""
    runs: dict[str, list[TrainPlan]] = {}
    for trial in trials:
        if trial.train is not None:
            runs.setdefault(trial.row, []).append(trial.train)
    return {method: {**_settings(plans[0]), **_found_rates(plans)} for method, plans in runs.items()}


def reading_notes(plan: ComparePlan) -> list[str]:
    """How to read the table: what the numbers are, what the deviations are over, what was equal."""
    protocols = list(dict.fromkeys(_decoding_text(evaluation) for evaluation in plan.trials[0].evaluations))
    how = protocols[0] if len(protocols) == 1 else "decoded by each benchmark's own protocol, stored with its scores"
    trained = _training_notes(plan) if any(trial.train is not None for trial in plan.trials) else []
    return [
        f"ROUGE-L F (0–100, higher is better), {how}; avg is the mean over benchmarks.",
        *trained,
        *_metric_notes(plan.experiment.evaluation.metrics),
        "teacher and untrained (the student before training) are there for orientation.",
        *_baseline_notes(plan),
    ]


def _training_notes(plan: ComparePlan) -> list[str]:
    training = plan.experiment.train
    return [
        f"± is the standard deviation over {len(training.seeds)} training seeds."
        if len(training.seeds) > 1
        else "One training seed: the deviation beside a score is over decoding seeds of one checkpoint, "
        "which says nothing about the variance of training.",
        f"Every trained row had {_budget(training)} and the same data order{_other_order(plan)}."
        if plan.experiment.fair
        else "Methods have budgets of their own (fair: false); the report lists every setting in which they differ.",
    ]


def _baseline_notes(plan: ComparePlan) -> list[str]:
    if plan.missing_baseline is None:
        return []
    return [f"The baseline {plan.missing_baseline} has no finished trial; methods are compared with {plan.baseline} instead."]


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
    others = dict.fromkeys(trial.row for trial in plan.trials if trial.train is not None and trial.train.generated is not None)
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
    scores = read_scores(plan.place.open().path)
    per_seed = {metric: [float(seed[metric]) for seed in scores["per_seed"]] for metric in METRICS}
    measured = {metric.name: read_metric(metric) for metric in trial.metrics if metric.evaluation == plan}
    per_seed |= {name: values for name, values in measured.items() if values}
    return RunScores(trial.row, trial.seed, plan.benchmark.name, per_seed)


def _costs(trials: Sequence[Trial]) -> dict[str, dict[str, str]]:
    costs = {}
    for trial in trials:
        artifact = trial.train.place.existing() if trial.train else None
        if artifact is not None:
            counts = artifact.manifest.counts
            costs[trial.name] = {
                "steps": str(counts["steps"]),
                "training s": f"{counts['seconds']:.0f}",
                "tokens": f"{counts['tokens']:,}",
                "tokens/s": f"{counts['tokens'] / max(counts['seconds'], 1e-9):.0f}",
                "peak GiB": f"{counts['peak_memory_gib']:.1f}",
                "kept step": str(counts["best_step"]),
                "learning rate": f"{counts['learning_rate']:g}",
            }
    return costs
