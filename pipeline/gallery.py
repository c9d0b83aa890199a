"""What a comparison adds to the MLflow UI: its report and description, generations side by side, images of every run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from pipeline.artifacts import Artifact
from pipeline.leaderboard import CURVES, FINISHED, IMAGES, KIND_TAG, NOTE_TAG, VIEW_TAG, Links, description, view_state
from pipeline.reporting.aggregate import result_rows
from pipeline.reporting.evidence import paired_scores
from pipeline.reporting.looks import Look, drawing_style, looks
from pipeline.reporting.notes import reading_notes
from pipeline.reporting.record import Records, TrialRecord, run_scores
from pipeline.reporting.record_files import read_records
from pipeline.reporting.report import HEADLINE, costs_of, curves_of
from pipeline.reporting.statistics import PromptScores
from pipeline.stages.compare import ComparePlan
from pipeline.tracking import Tracker, experiment_reference, run_reference
from pipeline.trial import trial_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
    from pipeline.reporting.figures import Cost, Curve

COLOUR_TAG = "mlflow.runColor"
"""Tag of a run: its colour in the UI."""
FIGURES = ("scores", "curves", "cost", "lens", "confidence", "heat")
"""Figures of a run in the order in which the UI shows them."""
_TABLE_PROMPTS = 200
_DPI = 160


def track_comparison(plan: ComparePlan, artifact: Artifact, run_id: str, stages: str, tracker: Tracker) -> None:
    """Put everything into the UI that only the comparison knows.

    Args:
        plan: the comparison.
        artifact: where it is.
        run_id: its own run, which has the report.
        stages: the experiment of that run.
        tracker: told everything.
    """
    records = read_records(artifact.path)
    for benchmark, answers in generation_tables(records).items():
        tracker.log_table(run_id, answers, f"comparison/generations_{benchmark}.json")
    own_looks = looks(dict.fromkeys(trial.row for trial in plan.trials))
    shown: set[str] = set()
    keys = {trial.name: trial_key(trial) for trial in plan.trials}
    for trial, images in run_images(records):
        shown |= images.keys()
        own = tracker.told(keys[trial.name])
        if own is None:
            continue
        tracker.set_tags(own, {COLOUR_TAG: own_looks[trial.row].colour.lower()})
        for name, png in images.items():
            tracker.log_image(own, f"{IMAGES}/{name}", png)
    links = Links(experiment_reference(plan.experiment.name), experiment_reference(stages), run_reference(run_id))
    table, headline = ((artifact.path / name).read_text(encoding="utf-8").strip() for name in ("table.md", HEADLINE))
    tracker.describe(
        run_id,
        plan.experiment.name,
        {
            KIND_TAG: "custom_model_development",  # otherwise the UI asks, and shows pages for language model applications
            NOTE_TAG: description(plan.experiment, headline, table, reading_notes(records.facts), links),
            VIEW_TAG: view_state(
                [benchmark.benchmark.name for benchmark in plan.trials[0].evaluations],
                [name for name in FIGURES if name in shown],
            ),
            FINISHED: f"{artifact.manifest.created:.0f}",
        },
    )


def generation_tables(records: Records) -> dict[str, dict[str, list[str]]]:
    """Benchmark → a table of its first prompts: prompt, references, and one column per method (its first training seed)."""
    tables: dict[str, dict[str, list[str]]] = {}
    for row, trials in records.facts.rows.items():
        for own in trials[0].evaluations:
            answers, prompts = records.generations.answers(own), records.generations.prompts[own.prompts]
            ids = list(answers)[:_TABLE_PROMPTS]
            table = tables.setdefault(
                own.benchmark,
                {
                    "id": ids,
                    "prompt": [_asked(prompts[name].text) for name in ids],
                    "references": ["\n---\n".join(prompts[name].references) for name in ids],
                },
            )
            table[row] = [answers[name]["prediction"] if name in answers else "" for name in table["id"]]
    for table in tables.values():
        table["id"] = table.pop("id")  # last: it says nothing to a reader
    return tables


def _asked(prompt: str) -> str:
    """A prompt without what its template puts around every one: a table's cell shows the first few words."""
    _, marker, asked = prompt.partition("### Instruction:\n")
    return asked.removesuffix("\n\n### Response:\n") if marker else prompt


def run_images(records: Records) -> Iterator[tuple[TrialRecord, dict[str, bytes]]]:
    """Every trial's own figures as PNG by name, on axes that all trials share, so that they can be compared side by side."""
    own_looks = looks(records.facts.rows)
    found = _facts(records)
    for trial in records.facts.trials:
        drawn = _figures(found, trial.name, own_looks[trial.row])
        yield trial, {name: _png(figure) for name, figure in drawn.items()}


@dataclass(frozen=True)
class _Facts:
    """What there is to draw, each by a trial's name; a trial that lacks something is not in it."""

    scores: Mapping[str, Sequence[PromptScores]]
    curves: Mapping[str, Mapping[str, Curve]]
    costs: Mapping[str, Cost]
    profiles: Mapping[str, Sequence[LayerProfile]]
    heats: Mapping[str, LensHeat]


def _facts(records: Records) -> _Facts:
    trials, scores = records.facts.trials, paired_scores(records)
    rows, label = result_rows(run_scores(records.facts)), attrgetter("name")
    by_name = {trial.name: _own_scores(trial, scores) for trial in trials}
    curves = {name: runs[0] for name, runs in curves_of(trials, CURVES, label).items()}
    return _Facts(
        scores={name: own for name, own in by_name.items() if own},
        curves={name: own for name, own in curves.items() if any(own.values())},
        costs={name: runs[0] for name, runs in costs_of(trials, rows, label).items()},
        profiles={trial.name: trial.profile for trial in trials if trial.profile is not None},
        heats={trial.name: trial.heat for trial in trials if trial.heat is not None},
    )


def _own_scores(trial: TrialRecord, scores: Sequence[PromptScores]) -> list[PromptScores]:
    """The scores of its row, of its training seed alone."""
    found = [(own, own.train_seeds.index(trial.seed)) for own in scores if own.method == trial.row]
    return [replace(own, train_seeds=(trial.seed,), scores=own.scores[at : at + 1]) for own, at in found]


def _figures(found: _Facts, run: str, look: Look) -> dict[str, Figure]:
    """Name → figure, for everything that there is of a run."""
    from pipeline.reporting import run_figures

    drawn: dict[str, Figure] = {}
    if run in found.scores:
        drawn["scores"] = run_figures.score_figure(found.scores, run, look)
    if run in found.curves:
        drawn["curves"] = run_figures.curve_figure(found.curves, run, look)
    if run in found.costs:
        drawn["cost"] = run_figures.cost_figure(found.costs, run, look)
    if run in found.profiles:
        drawn["lens"] = run_figures.divergence_figure(found.profiles, run, look)
        drawn["confidence"] = run_figures.confidence_figure(found.profiles, run, look)
    if run in found.heats:
        drawn["heat"] = run_figures.heat_figure(found.heats[run])
    return drawn


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with drawing_style():
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
