"""Stage 5: every evaluation of an experiment in one comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.config.experiment import Experiment
from pipeline.errors import ArtifactError
from pipeline.reporting.aggregate import METRICS, ResultRow, RunScores, result_rows
from pipeline.reporting.record_files import write_records
from pipeline.reporting.report import write_report
from pipeline.stages import report
from pipeline.stages.evaluate import EvaluatePlan, read_scores
from pipeline.stages.lens_profile import LensProfilePlan
from pipeline.stages.measure import MetricPlan, read_metric
from pipeline.stages.place import Place, build, place
from pipeline.stages.report import git_commit as git_commit
from pipeline.stages.train import TrainPlan

VERSION = 5
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
    """Write the report, see `pipeline.reporting.report.write_report`, and the records that it is made from."""

    def work(folder: Path) -> Mapping[str, Any]:
        scores = trial_scores(plan.trials)
        records = report.measured(plan, scores)
        write_records(folder, records)
        write_report(folder, records, plan.experiment.name, plan.place.fingerprint, report.here())
        return {"rows": len(result_rows(scores)), "trials": len(plan.trials)}

    return build(plan.place, work, replace=True)


def trial_scores(trials: Sequence[Trial]) -> list[RunScores]:
    """The scores behind the comparison."""
    return [_run_scores(trial, plan) for trial in trials for plan in trial.evaluations]


def trial_rows(trial: Trial) -> list[ResultRow]:
    """results.csv rows of one trial."""
    return result_rows(trial_scores([trial]))


def _run_scores(trial: Trial, plan: EvaluatePlan) -> RunScores:
    scores = read_scores(plan.place.open().path)
    per_seed = {metric: [float(seed[metric]) for seed in scores["per_seed"]] for metric in METRICS}
    measured = {metric.name: read_metric(metric) for metric in trial.metrics if metric.evaluation == plan}
    per_seed |= {name: values for name, values in measured.items() if values}
    return RunScores(trial.row, trial.seed, plan.benchmark.name, per_seed)
