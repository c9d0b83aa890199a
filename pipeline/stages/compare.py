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
from pipeline.reporting import render
from pipeline.reporting.aggregate import METRICS, ResultRow, RunScores, result_rows, table
from pipeline.stages.evaluate import GENERATIONS, EvaluatePlan, read_scores
from pipeline.stages.place import Place, build, place
from pipeline.stages.train import TrainPlan

VERSION = 1
_EXAMPLES_PER_BENCHMARK = 2


@dataclass(frozen=True)
class Trial:
    """A row of the comparison: one model.

    Attributes:
        method: the method's name, "teacher" or "untrained".
        seed: training seed, None for models that are not trained here.
        train: its training, None for models that are not trained here.
        evaluations: one per benchmark.
    """

    method: str
    seed: int | None
    train: TrainPlan | None
    evaluations: tuple[EvaluatePlan, ...]

    def finished(self) -> bool:
        """Whether every artifact of it is there."""
        places = [plan.place for plan in self.evaluations] + ([self.train.place] if self.train else [])
        return all(place.existing() is not None for place in places)

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
    recipe = {"name": experiment.name, "description": experiment.description, "fair": experiment.fair}
    path = run_dir / experiment.name / "comparison"
    return ComparePlan(place(root, "compare", VERSION, "compare", recipe, upstream, path), experiment, tuple(trials))


def run(plan: ComparePlan) -> Artifact:
    """Write results.csv, table.md and report.html."""

    def work(folder: Path) -> Mapping[str, Any]:
        rows = result_rows(trial_scores(plan.trials))
        cells = table(rows)
        render.write_csv(folder / "results.csv", rows)
        write_text_atomically(folder / "table.md", render.markdown_table(cells))
        page = render.Page(
            name=plan.experiment.name,
            description=plan.experiment.description,
            notes=reading_notes(plan),
            costs=_costs(plan.trials),
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


def reading_notes(plan: ComparePlan) -> list[str]:
    """How to read the table: what the numbers are, what the deviations are over, what was equal."""
    evaluation, training = plan.experiment.evaluation, plan.experiment.train
    decoding = evaluation.decoding
    how = (
        f"sampled at temperature {decoding.temperature:g}, top-p {decoding.top_p:g}, {len(evaluation.seeds)} decoding seed(s)"
        if decoding.do_sample
        else "decoded greedily"
    )
    deviation = (
        f"± is the standard deviation over {len(training.seeds)} training seeds."
        if len(training.seeds) > 1
        else "One training seed: ± in brackets is the standard deviation over decoding seeds of one checkpoint, "
        "which says nothing about the variance of training."
    )
    budget = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    return [
        f"ROUGE-L F (0–100, higher is better), {how}, at most {decoding.max_new_tokens} new tokens; "
        "avg is the mean over benchmarks.",
        deviation,
        f"Every trained row had {budget} of {training.batch_size} rows, peak learning rate {training.learning_rate:g} "
        "and the same data order.",
        "teacher and untrained (the student before training) are there for orientation.",
    ]


def _run_scores(trial: Trial, plan: EvaluatePlan) -> RunScores:
    scores = read_scores(plan.place.path)
    per_seed = {metric: [float(seed[metric]) for seed in scores["per_seed"]] for metric in METRICS}
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
