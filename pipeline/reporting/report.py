"""A report from records: results, tables, figures and the page, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import write_text_atomically
from pipeline.evaluation.lens_profile import LensHeat, write_profiles
from pipeline.reporting import examples as rules
from pipeline.reporting import exports, render
from pipeline.reporting.aggregate import AVERAGE, METRICS, ResultRow, result_rows, table
from pipeline.reporting.differences import ABSENT, Difference, differences, write_csv
from pipeline.reporting.evidence import Evidence, evidence
from pipeline.reporting.notes import limits, mixing_warning, reading_notes
from pipeline.reporting.paper import Score
from pipeline.reporting.record import Facts, Prompt, Records, TrainingRecord, TrialRecord, run_scores
from pipeline.reporting.render import Answer, Example, Picture, signed

if TYPE_CHECKING:
    from pipeline.reporting.figures import Cost

HEADLINE = "headline.txt"
FIGURES = "figures"
CURVES = ("train/loss", "dev/loss", "dev/rouge_l")
"""Learning curves that are recorded and drawn."""
_MOST_HEATS = 24
Curves = dict[str, list[tuple[int, float]]]
"""Metric → (step, value)."""
Label = Callable[[TrialRecord], str]
"""What a trial's line or bar is called: trials of one label are drawn alike."""


def write_report(folder: Path, records: Records, name: str, fingerprint: str, here: Mapping[str, str]) -> None:
    """Write results.csv and .parquet, differences.csv, headline.txt, table.md and .tex, report.html and figures/.

    Args:
        folder: where they go.
        records: what is reported.
        name: title of the page.
        fingerprint: of the comparison.
        here: code and machine that write the report.
    """
    facts, found = records.facts, evidence(records)
    rows = result_rows(run_scores(facts))
    cells, warning, marked = table(rows), mixing_warning(facts), "tested" if found.left_out else "trained"
    render.write_csv(folder / "results.csv", rows)
    exports.write_parquet(folder / "results.parquet", rows)
    write_text_atomically(folder / HEADLINE, found.headline + "\n")
    write_text_atomically(folder / "table.md", render.markdown_table(cells, found.standings) + (warning and f"\n{warning}\n"))
    write_text_atomically(folder / "table.tex", (warning and f"% {warning}\n") + exports.tex_table(cells, found.standings))
    settings = settings_of(_trainings(facts))
    differing = [*differences(settings), *_differing_inputs(facts)]
    write_csv(folder / "differences.csv", differing, list(settings))
    extra = dict.fromkeys(row.metric for row in rows if row.metric not in METRICS)
    page = render.Page(
        name=name,
        description=_description(facts),
        headline=found.headline,
        warning=warning,
        standing=render.standing_text(found.standings.get(AVERAGE), marked),
        cells=cells,
        notes=reading_notes(facts),
        orientation=[trial.row for trial in facts.trials if trial.training is None],
        standings=found.standings,
        marked=marked,
        published=_published(facts),
        comparison=found.comparison,
        others={metric: table(rows, metric) for metric in extra},
        costs=_costs(facts.trials),
        shared_costs=_shared_costs(facts.trials),
        differences=differing,
        figures=_draw(facts, found, rows, folder),
        examples=_examples(records, found),
        rule=rules.RULE if found.comparison else rules.DRAWN_RULE,
        limits=limits(facts, found),
        provenance=_provenance(facts, fingerprint, here),
    )
    write_text_atomically(folder / "report.html", render.html_page(page))


def settings_of(trainings: Mapping[str, Sequence[TrainingRecord]]) -> dict[str, dict[str, Any]]:
    """Row → every setting that it was trained with and that a method can have of its own, by dotted path."""
    return {row: {**runs[0].settings, **_found_rates(runs)} for row, runs in trainings.items()}


def curves_of(trials: Sequence[TrialRecord], metrics: Sequence[str], label: Label) -> dict[str, list[Curves]]:
    """Label → for each of its runs metric → curve."""
    curves: dict[str, list[Curves]] = {}
    for trial in trials:
        run = None if trial.training is None else trial.training.run
        if run is not None:
            curves.setdefault(label(trial), []).append({name: run.curves.get(name, []) for name in metrics})
    return curves


def costs_of(trials: Sequence[TrialRecord], rows: Sequence[ResultRow], label: Label) -> dict[str, list[Cost]]:
    """Label → for each of its runs training time and average score, where there is an average."""
    from pipeline.reporting.figures import Cost

    means = {(row.method, row.train_seed): row.mean for row in rows if (row.benchmark, row.metric) == (AVERAGE, "rouge_l")}
    costs: dict[str, list[Cost]] = {}
    for trial in trials:
        run = None if trial.training is None else trial.training.run
        if run is not None and (trial.row, trial.seed) in means:
            costs.setdefault(label(trial), []).append(Cost(run.seconds, means[trial.row, trial.seed]))
    return costs


def _trainings(facts: Facts) -> dict[str, list[TrainingRecord]]:
    """Row → its trainings, without rows that were not trained here."""
    found = {row: [trial.training for trial in trials if trial.training] for row, trials in facts.rows.items()}
    return {row: runs for row, runs in found.items() if runs}


def _found_rates(runs: Sequence[TrainingRecord]) -> dict[str, Any]:
    """The learning rate that the search kept for each training seed."""
    rates = [f"{own.run.learning_rate:g}" for own in runs if own.searched and own.run is not None]
    return {"train.learning_rate kept by the search": ", ".join(rates)} if rates else {}


def _differing_inputs(facts: Facts) -> list[Difference]:
    """Inputs that are not the same for all rows; what a row does not use makes none of them differ."""
    inputs: dict[str, dict[str, str]] = {}
    for row, runs in _trainings(facts).items():
        used = [own for own in runs[0].inputs if own.what != "teacher" or runs[0].asks_teacher]
        inputs[row] = {own.what: f"{own.name} ({own.fingerprint[-8:]})" for own in used}
    return [row for row in differences(inputs) if len(set(row.values.values()) - {ABSENT}) > 1]


def _description(facts: Facts) -> str:
    if not facts.merged:
        return facts.experiments[0].description
    return "Several experiments together: " + "; ".join(
        f"{own.label} ({own.description.strip().rstrip('.')})" if own.description.strip() else own.label
        for own in facts.experiments
    ) + "."  # fmt: skip


def _published(facts: Facts) -> dict[tuple[str, str], Score]:
    """(row, benchmark) → the paper's score, where every experiment that has the row may be compared with it."""
    known = {(own.fingerprint, score.method, score.benchmark): score for own in facts.experiments for score in own.published}
    found = {}
    for row, trials in facts.rows.items():
        origins = {origin for trial in trials for origin in trial.origins}
        for name in trials[0].by_benchmark:
            scores = [known.get((origin, trials[0].own_row, name)) for origin in origins]
            if scores[0] is not None and None not in scores:
                found[row, name] = scores[0]
    return found


def _costs(trials: Sequence[TrialRecord]) -> dict[str, dict[str, str]]:
    runs = {trial.name: trial.training.run for trial in trials if trial.training is not None}
    return {
        name: {
            "steps": str(run.steps),
            "training s": f"{run.seconds:.0f}",
            "tokens": f"{run.tokens:,}",
            "tokens/s": f"{run.tokens / max(run.seconds, 1e-9):.0f}",
            "peak GiB": f"{run.peak_memory_gib:.1f}",
            "kept step": str(run.best_step),
            "learning rate": f"{run.learning_rate:g}",
        }
        for name, run in runs.items()
        if run is not None
    }


def _shared_costs(trials: Sequence[TrialRecord]) -> list[str]:
    """Work whose result several runs share."""
    users: dict[str, dict[str, None]] = {}
    works = {}
    for trial in trials:
        for work in [] if trial.training is None else trial.training.shared:
            works[work.fingerprint] = work
            users.setdefault(work.fingerprint, {})[trial.row] = None
    return [f"{work.label}: {work.seconds:.0f} s once, for {', '.join(users[key])}." for key, work in works.items()]


def _draw(facts: Facts, found: Evidence, rows: Sequence[ResultRow], folder: Path) -> dict[str, list[Picture]]:
    """Write figures/*.png and *.svg; section of the report → its figures."""
    from pipeline.reporting import figures

    (folder / FIGURES).mkdir(exist_ok=True)
    sections: dict[str, list[Picture]] = {"lens": _lens_figures(facts, folder)}
    alike = " among methods with the same data" if len(facts.data) > 1 else ""
    if found.scores:
        sections["scores"] = [
            _save(
                figures.score_figure(found.scores), folder, "scores", "Scores with intervals",
                "Bars are means, whiskers 95 % intervals over prompts, and dots, where there are any, single training seeds. "
                "Whiskers that overlap do not mean that methods are equal: the paired comparison is sharper.",
            )
        ]  # fmt: skip
    if found.comparison is not None and found.comparison.averages:
        contrasts = (*found.comparison.averages, *found.comparison.benchmarks)
        sections["effects"] = [
            _save(
                figures.effect_figure(contrasts, found.comparison.baseline), folder, "effects",
                f"Differences to {found.comparison.baseline}",
                "Right of the line a method scores higher, left of it lower. A hollow marker is not separated from zero after "
                "the correction, wherever it lies.",
            )
        ]  # fmt: skip
    curves, costs = curves_of(facts.trials, CURVES, attrgetter("row")), costs_of(facts.trials, rows, attrgetter("row"))
    if any(curve for runs in curves.values() for run in runs for curve in run.values()):
        sections["curves"] = [
            _save(
                figures.curve_figure(curves), folder, "curves", "Learning curves",
                "One line per method, the mean over its training seeds; training loss is a running mean. Training losses are "
                f"of different objectives, so their heights do not compare; dev metrics do{alike}.",
            )
        ]  # fmt: skip
    if costs:
        references = {
            row.method: row.mean
            for row in rows
            if (row.benchmark, row.metric, row.train_seed) == (AVERAGE, "rouge_l", None) and row.method not in costs
        }
        sections["cost"] = [
            _save(
                figures.cost_figure(costs, references), folder, "cost", "Cost against quality",
                "Up and left is better: a higher score for less training time. Levels are models that were not trained here."
                + (" Experiments may have run on different machines." if facts.merged else ""),
            )
        ]  # fmt: skip
    return sections


def _save(figure: Any, folder: Path, name: str, title: str, caption: str) -> Picture:
    from pipeline.reporting import lens_figure

    return Picture(title, lens_figure.save(figure, folder / FIGURES / name)[1], caption)


def _lens_figures(facts: Facts, folder: Path) -> list[Picture]:
    """lens_profile.json and its figures, for the trials that have a profile."""
    profiles = {trial.name: trial.profile for trial in facts.trials if trial.profile is not None}
    own = " Each student against its own teacher, on its own experiment's dev rows." if facts.merged else ""
    if not profiles:
        return []
    from pipeline.reporting import lens_figure

    write_profiles(folder / "lens_profile.json", profiles)
    return [
        _save(
            lens_figure.divergence_figure(profiles), folder, "lens_divergence",
            "Divergence to the teacher at every mapped layer",
            f"Lower is closer to the teacher; the last layer is the prediction itself.{own}",
        ),
        _save(
            lens_figure.confidence_figure(profiles), folder, "lens_confidence",
            "Over- and under-confidence at every mapped layer",
            f"Left: where the student gives a token more probability than the teacher; right: where it gives less.{own}",
        ),
        *_heat_figures(facts, folder, own),
    ]  # fmt: skip


def _heat_figures(facts: Facts, folder: Path, own: str) -> list[Picture]:
    """The heat map of each row's first training seed, or none."""
    from pipeline.reporting import lens_figure

    heats: dict[str, LensHeat] = {}
    for trials in facts.rows.values():
        heats.update([(trial.name, trial.heat) for trial in trials if trial.heat is not None][:1])
    if not heats:
        return []
    left_out = f" The first {_MOST_HEATS} of {len(heats)} rows of the table." if len(heats) > _MOST_HEATS else ""
    same = "" if facts.merged else " Every method is shown on the same dev row."
    return [
        _save(
            lens_figure.heat_figure(dict(list(heats.items())[:_MOST_HEATS])), folder, "lens_heat",
            "Divergence to the teacher, token by token",
            "A cell is a mapped layer at one token of the reference response to a dev row; the top line is the prediction of "
            "that token itself. Colours from the scale's left are close to the teacher, in every panel alike. The first "
            f"training seed of each method.{same}{own}{left_out}",
        )
    ]  # fmt: skip


def _examples(records: Records, found: Evidence) -> list[Example]:
    """The generations that the rule chooses."""
    baseline = records.facts.baseline
    choices = rules.choose(found.tested or found.scores, baseline if found.tested else None)
    ids: dict[str, list[str]] = {}
    for choice in choices:
        ids.setdefault(choice.benchmark, []).append(choice.id)
    # Benchmark and prompt → row → its trial's name, its prompt and its answer.
    answered: dict[rules.Prompt, dict[str, tuple[Prompt, Answer]]] = {}
    for trial in records.facts.trials:
        for own in trial.evaluations:
            prompts = records.generations.prompts.get(own.prompts, {})
            for name, row in records.generations.answers(own, ids.get(own.benchmark, [])).items():
                answer = Answer(trial.name, row["prediction"], row["rouge_l"])
                answered.setdefault((own.benchmark, name), {}).setdefault(trial.row, (prompts[name], answer))
    trained = [trial.row for trial in records.facts.trials if trial.training is not None and trial.row != baseline]
    return [_example(choice, answered[choice.benchmark, choice.id], trained, baseline) for choice in choices]


def _example(
    choice: rules.Choice, answered: Mapping[str, tuple[Prompt, Answer]], trained: Sequence[str], baseline: str | None
) -> Example:
    """Beside each other stand answers to the same prompt only; rows that cannot be paired may lack it."""
    head = baseline if baseline is not None and baseline in answered else next(iter(answered))
    asked = answered[head][0]
    answers = {row: answer for row, (prompt, answer) in answered.items() if prompt == asked}
    beside = choice.method or next((row for row in trained if row in answers), None)
    first = [row for row in (baseline, beside) if row in answers] or list(answers)[:1]
    others = [answer for row, answer in answers.items() if row not in first]
    return Example(_title(choice, baseline), asked.text, asked.references, [answers[row] for row in first], others)


def _title(choice: rules.Choice, baseline: str | None) -> str:
    if choice.method is None or choice.gain is None:
        return f"{choice.benchmark} · {choice.rule}"
    return f"{choice.benchmark} · {choice.rule} · {choice.method} {signed(choice.gain)} against {baseline}"


def _provenance(facts: Facts, fingerprint: str, here: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Group → name → value: code and machine, experiments, protocols, fingerprints."""
    runs = [trial.training for trial in facts.trials if trial.training is not None]
    versions = dict.fromkeys(_listed(own.run.versions) for own in runs if own.run is not None)
    code = {**here, "trained with": "; ".join(versions) or "nothing was trained here"}
    made = {own.label: _listed({"comparison": own.fingerprint, **own.written}) for own in facts.experiments}
    prints: dict[str, dict[str, None]] = {"comparison": {fingerprint: None}}
    for trial in facts.trials:
        for own in [] if trial.training is None else trial.training.inputs:
            prints.setdefault(own.label, {})[own.fingerprint] = None
    whose = {trial.name: f" ({facts.labels(trial.origins)})" if facts.merged else "" for trial in facts.trials}
    for trial in facts.trials:
        if trial.training is not None:
            prints.setdefault(trial.training.label + whose[trial.name], {})[trial.training.fingerprint] = None
    for trial in facts.trials:
        for evaluation in trial.evaluations:
            prints.setdefault(evaluation.label + whose[trial.name], {})[evaluation.fingerprint] = None
    return {
        "Code and machine": code,
        # Of the report that an experiment made itself there is nothing else to say.
        **({"Experiments": made} if [own.fingerprint for own in facts.experiments] != [fingerprint] else {}),
        "Protocol hashes": {name: ", ".join(found) for name, found in facts.protocols.items()},
        "Fingerprints": {label: ", ".join(found) for label, found in prints.items()},
    }


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
