"""What a comparison adds to the MLflow UI: its report and description, generations side by side, images of every run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as parquet

from pipeline.artifacts import Artifact
from pipeline.leaderboard import CURVES, FINISHED, IMAGES, KIND_TAG, NOTE_TAG, VIEW_TAG, Links, description, view_state
from pipeline.reporting import figures
from pipeline.reporting.aggregate import ResultRow
from pipeline.reporting.statistics import PromptScores
from pipeline.stages import report
from pipeline.stages.compare import HEADLINE, ComparePlan, Trial, reading_notes, trial_rows
from pipeline.stages.evaluate import GENERATIONS
from pipeline.stages.lens_profile import read_profile
from pipeline.tracking import Tracker
from pipeline.trial import trial_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TABLE_PROMPTS = 200
_DPI = 90


def track_comparison(plan: ComparePlan, artifact: Artifact, run_id: str, stages: str, tracker: Tracker) -> None:
    """Put everything into the UI that only the comparison knows.

    Args:
        plan: the comparison.
        artifact: where it is.
        run_id: its own run, which has the report.
        stages: the experiment of that run.
        tracker: told everything.
    """
    for benchmark, answers in generation_tables(plan.trials).items():
        tracker.log_table(run_id, answers, f"comparison/generations_{benchmark}.json")
    for trial, images in run_images(plan.trials, report.paired_scores(plan.trials)):
        own = tracker.delivered(trial_key(trial))
        for name, png in images.items() if own is not None else ():
            tracker.log_image(str(own), f"{IMAGES}/{name}", png)
    here, there = tracker.experiment_id(plan.experiment.name), tracker.experiment_id(stages)
    if here is None or there is None:
        return
    table, headline = ((artifact.path / name).read_text(encoding="utf-8").strip() for name in ("table.md", HEADLINE))
    tracker.describe(
        plan.experiment.name,
        {
            KIND_TAG: "custom_model_development",  # otherwise the UI asks, and shows pages for language model applications
            NOTE_TAG: description(plan.experiment, headline, table, reading_notes(plan), Links(here, there, run_id)),
            VIEW_TAG: view_state([benchmark.benchmark.name for benchmark in plan.trials[0].evaluations]),
            FINISHED: f"{artifact.manifest.created:.0f}",
        },
    )


def generation_tables(trials: Sequence[Trial]) -> dict[str, dict[str, list[str]]]:
    """Benchmark → a table of its first prompts: prompt, references, and one column per method (its first training seed)."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.row, trial)
    tables: dict[str, dict[str, list[str]]] = {}
    for row, trial in first.items():
        for plan in trial.evaluations:
            answers = _first_answers(plan.place.path / GENERATIONS)
            table = tables.setdefault(
                plan.benchmark.name,
                {
                    "id": list(answers),
                    "prompt": [answer["prompt"] for answer in answers.values()],
                    "references": ["\n---\n".join(answer["references"]) for answer in answers.values()],
                },
            )
            table[row] = [answers[name]["prediction"] if name in answers else "" for name in table["id"]]
    return tables


def _first_answers(file: Path) -> dict[str, dict[str, Any]]:
    """Prompt id → its row under the first decoding seed."""
    rows = parquet.read_table(file, columns=["id", "seed", "prompt", "references", "prediction"]).to_pylist()
    seed = rows[0]["seed"]
    return {row["id"]: row for row in [row for row in rows if row["seed"] == seed][:_TABLE_PROMPTS]}


def run_images(trials: Sequence[Trial], scores: Sequence[PromptScores]) -> Iterator[tuple[Trial, dict[str, bytes]]]:
    """Every trial's own figures as PNG by name, on the axes that the comparison's figures have.

    Equal axes are what lets images be compared side by side.

    Args:
        trials: finished trials.
        scores: of every row, with all of its training seeds; empty where rows cannot be put side by side.
    """
    rows = [row for trial in trials for row in trial_rows(trial)]
    # Each run by itself here too: a mean over training seeds would have narrower axes than its runs need.
    singly = [replace(own, method=trial.name) for trial in trials for own in _own_scores(trial, scores)]
    common = _figures(trials, singly, rows, attrgetter("name"))
    for trial in trials:
        own = _figures([trial], _own_scores(trial, scores), rows, attrgetter("row"))
        yield trial, {name: _png(_on_axes_of(common[name], figure, name)) for name, figure in own.items()}


def _own_scores(trial: Trial, scores: Sequence[PromptScores]) -> list[PromptScores]:
    """The scores of its row, of its training seed alone."""
    found = [(own, own.train_seeds.index(trial.seed)) for own in scores if own.method == trial.row]
    return [replace(own, train_seeds=(trial.seed,), scores=own.scores[at : at + 1]) for own, at in found]


def _figures(
    trials: Sequence[Trial], scores: Sequence[PromptScores], rows: Sequence[ResultRow], label: report.Label
) -> dict[str, Figure]:
    """Name → figure, for everything that these trials, by their labels, have."""
    from pipeline.reporting import lens_figure

    drawn: dict[str, Figure] = {}
    if scores:
        drawn["scores"] = figures.score_figure(scores)
    curves, costs = report.curves_of(trials, CURVES, label), report.costs_of(trials, rows, label)
    if any(curve for runs in curves.values() for run in runs for curve in run.values()):
        drawn["curves"] = figures.curve_figure(curves)
    if costs:
        drawn["cost"] = figures.cost_figure(costs, {})
    profiles = {trial.name: read_profile(trial.profile) for trial in trials if trial.profile is not None}
    if profiles:
        drawn["lens"] = lens_figure.divergence_figure(profiles)
    return drawn


def _on_axes_of(common: Figure, own: Figure, name: str) -> Figure:
    """Give the panels of a trial's figure the limits that its panel has in the figure of all trials."""
    panels = {axes.get_title(loc="left"): axes for axes in common.axes}
    for axes in own.axes:
        wide = panels[axes.get_title(loc="left")]
        if name in ("scores", "curves", "cost"):
            axes.set_xscale(wide.get_xscale())
            axes.set_xlim(wide.get_xlim())
        if name in ("curves", "cost", "lens"):  # bars have a place each, and only their own here
            axes.set_yscale(wide.get_yscale())
            axes.set_ylim(wide.get_ylim())
    return own


def _png(figure: Figure) -> bytes:
    from pipeline.reporting.looks import drawing_style

    stream = io.BytesIO()
    with drawing_style():
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
