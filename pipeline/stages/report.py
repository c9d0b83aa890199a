"""What the report of a comparison is made of: evidence, figures, generations, limits and provenance of its trials."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as parquet

import pipeline
from pipeline.artifacts import Artifact
from pipeline.data.prompts import holds_special_tokens
from pipeline.data.tokenize import read_encoded, read_prompts
from pipeline.errors import DataError
from pipeline.evaluation.lens_profile import write_profiles
from pipeline.models.load import load_tokenizer
from pipeline.reporting import examples as rules
from pipeline.reporting.aggregate import AVERAGE, ResultRow
from pipeline.reporting.compare import Comparison, Standing, compare_methods, headline, prompt_scores, ties
from pipeline.reporting.overlap import Overlap, Seen, overlap, seen
from pipeline.reporting.render import Answer, Example, Picture, signed
from pipeline.reporting.statistics import PromptScores
from pipeline.stages.evaluate import GENERATIONS, EvaluatePlan, read_scores
from pipeline.stages.fit import METRICS
from pipeline.stages.lens_profile import read_profile
from pipeline.stages.place import MODEL, obtain
from pipeline.stages.prepare import DEV_PROMPTS, PROMPTS, TRAIN
from pipeline.stages.train import TrainPlan

if TYPE_CHECKING:
    from pipeline.reporting.figures import Cost
    from pipeline.stages.compare import Trial

FIGURES = "figures"
_CURVES = ("train/loss", "dev/loss", "dev/rouge_l")
_FEW_SEEDS = 5
Curves = dict[str, list[tuple[int, float]]]
"""Metric → (step, value)."""
Label = Callable[["Trial"], str]
"""What a trial's line or bar is called: trials of one label are drawn alike."""


@dataclass(frozen=True)
class Evidence:
    """What can be said of the methods.

    Attributes:
        headline: in one sentence.
        scores: of every row on every benchmark; empty where rows cannot be put side by side.
        tested: those that are compared: of methods trained here, and of the baseline.
        comparison: against the baseline, None without one.
        standings: column → best and ties; empty where there are fewer than two methods.
        problem: why rows cannot be compared, empty if they can.
    """

    headline: str
    scores: Sequence[PromptScores] = ()
    tested: Sequence[PromptScores] = ()
    comparison: Comparison | None = None
    standings: Mapping[str, Standing] | None = None
    problem: str = ""


def evidence(trials: Sequence[Trial], baseline: str | None) -> Evidence:
    """Compare the rows prompt by prompt; rows with other prompts or decoding seeds have scores but no comparison."""
    scores: list[PromptScores] = []
    try:
        scores = _prompt_scores(trials)
        if baseline is None:
            return Evidence("No method was trained here: the table shows the models as they are.", scores)
        trained = {trial.row for trial in trials if trial.train is not None}
        tested = [own for own in scores if own.method in trained or own.method == baseline]
        comparison = compare_methods(tested, baseline)
        standings = ties(tested, comparison) if comparison.averages else {}
    except DataError as error:
        told = "The methods are not compared: their evaluations cannot be paired prompt by prompt."
        return Evidence(told, scores, problem=str(error))
    return Evidence(headline(comparison), scores, tested, comparison, standings)


def paired_scores(trials: Sequence[Trial]) -> Sequence[PromptScores]:
    """Scores of every row on every benchmark; none where rows cannot be put side by side."""
    try:
        return _prompt_scores(trials)
    except DataError:
        return ()  # the report says why, see `evidence`


def draw(trials: Sequence[Trial], found: Evidence, rows: Sequence[ResultRow], folder: Path) -> dict[str, list[Picture]]:
    """Write figures/*.png and *.svg; section of the report → its figures."""
    from pipeline.reporting import figures

    (folder / FIGURES).mkdir(exist_ok=True)
    sections: dict[str, list[Picture]] = {"lens": _lens_figures(trials, folder)}
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
    curves, costs = curves_of(trials, _CURVES, attrgetter("row")), costs_of(trials, rows, attrgetter("row"))
    if any(curve for runs in curves.values() for run in runs for curve in run.values()):
        sections["curves"] = [
            _save(
                figures.curve_figure(curves), folder, "curves", "Learning curves",
                "One line per method, the mean over its training seeds; training loss is a running mean. Training losses are "
                "of different objectives, so their heights do not compare; dev metrics do.",
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
                "Up and left is better: a higher score for less training time. Levels are models that were not trained here.",
            )
        ]  # fmt: skip
    return sections


def examples(trials: Sequence[Trial], found: Evidence, baseline: str | None) -> list[Example]:
    """The generations that the rule chooses."""
    choices = rules.choose(found.tested or found.scores, baseline if found.tested else None)
    rows = _first_trials(trials)
    responses = {
        (row, name): _responses(plan, [choice.id for choice in choices if choice.benchmark == name])
        for row, trial in rows.items()
        for name, plan in _evaluations(trial).items()
    }
    trained = [row for row, trial in rows.items() if trial.train is not None and row != baseline]
    shown = []
    for choice in choices:
        # Rows that cannot be paired may lack the prompt.
        own = {row: responses[row, choice.benchmark].get(choice.id) for row in rows if (row, choice.benchmark) in responses}
        answered = {row: text for row, text in own.items() if text is not None}
        beside = choice.method or next((row for row in trained if row in answered), None)
        first = [row for row in (baseline, beside) if row in answered] or list(answered)[:1]
        answers = {row: Answer(rows[row].name, text["prediction"], text["rouge_l"]) for row, text in answered.items()}
        head = next(iter(answered.values()))
        shown.append(
            Example(
                _title(choice, baseline), head["prompt"], head["references"], [answers[row] for row in first],
                [answer for row, answer in answers.items() if row not in first],
            )
        )  # fmt: skip
    return shown


def limits(trials: Sequence[Trial], found: Evidence) -> list[str]:
    """What the numbers cannot say: few seeds, references and responses that were cut, contaminated prompts."""
    said = [f"The methods are not compared prompt by prompt: {found.problem}."] if found.problem else []
    said += _seed_limits(trials)
    prompts = {plan.benchmark.name: read_scores(plan.place.path)["rows"] for plan in trials[0].evaluations}
    said.append(
        f"{sum(prompts.values())} prompts ({', '.join(f'{name} {count}' for name, count in prompts.items())}): differences "
        "that are small against the intervals above stay unseen, and other prompts may order the methods otherwise."
    )
    said += _cut_limits(trials)
    said += _overlap_limits(trials)
    said.append("ROUGE-L counts words shared with references in order; it sees neither truth nor style.")
    return said


def provenance(trials: Sequence[Trial], fingerprint: str) -> dict[str, dict[str, str]]:
    """Group → name → value: code and machine, protocols, fingerprints."""
    runs = {trial.name: trial.train for trial in trials if trial.train is not None}
    made = {name: plan.place.existing() for name, plan in runs.items()}
    versions = dict.fromkeys(_versions(artifact) for artifact in made.values() if artifact is not None)
    protocols: dict[str, dict[str, None]] = {}
    for trial in trials:
        for plan in trial.evaluations:
            protocols.setdefault(plan.benchmark.name, {})[plan.protocol_hash] = None
    inputs: dict[str, str] = {}
    for run in runs.values():
        inputs |= {where.label: where.fingerprint for where in (run.data.place, run.student.place)}
        inputs["teacher"] = run.teacher.digest[:16]
    return {
        "Code and machine": {
            "git commit": git_commit() or "not in a git checkout",
            "pipeline": pipeline.__version__,
            "trained with": "; ".join(versions) or "nothing was trained here",
            "report written on": _machine(),
        },
        "Protocol hashes": {name: ", ".join(found) for name, found in protocols.items()},
        "Fingerprints": {
            "comparison": fingerprint,
            **inputs,
            **{plan.place.label: plan.place.fingerprint for plan in runs.values()},
            **{plan.place.label: plan.place.fingerprint for trial in trials for plan in trial.evaluations},
        },
    }


def shared_costs(trials: Sequence[Trial]) -> list[str]:
    """Work whose result several runs share, from the manifests that are here."""
    users: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for trial in trials:
        if trial.train is not None:
            for plan in (trial.train.cache, trial.train.generated):
                artifact = None if plan is None else plan.place.existing()
                if plan is not None and artifact is not None:
                    users.setdefault(plan.place.label, []).append(trial.row)
                    seconds[plan.place.label] = artifact.manifest.seconds
    return [f"{label}: {seconds[label]:.0f} s once, for {', '.join(dict.fromkeys(rows))}." for label, rows in users.items()]


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


def _evaluations(trial: Trial) -> dict[str, EvaluatePlan]:
    return {plan.benchmark.name: plan for plan in trial.evaluations}


def _first_trials(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Row → its first trial."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.row, trial)
    return first


def _prompt_scores(trials: Sequence[Trial]) -> list[PromptScores]:
    tables: dict[tuple[str, str], dict[int | None, Any]] = {}
    for trial in trials:
        for name, plan in _evaluations(trial).items():
            read = parquet.read_table(plan.place.path / GENERATIONS, columns=["id", "seed", "rouge_l"])
            tables.setdefault((trial.row, name), {})[trial.seed] = read
    return [prompt_scores(row, name, found) for (row, name), found in tables.items()]


def _responses(plan: EvaluatePlan, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Prompt id → its row under the first decoding seed."""
    found = parquet.read_table(plan.place.path / GENERATIONS, filters=[("id", "in", list(ids))]) if ids else None
    first: dict[str, dict[str, Any]] = {}
    for row in [] if found is None else found.to_pylist():
        first.setdefault(row["id"], row)
    return first


def _title(choice: rules.Choice, baseline: str | None) -> str:
    if choice.method is None or choice.gain is None:
        return f"{choice.benchmark} · {choice.rule}"
    return f"{choice.benchmark} · {choice.rule} · {choice.method} {signed(choice.gain)} against {baseline}"


def _save(figure: Any, folder: Path, name: str, title: str, caption: str) -> Picture:
    from pipeline.reporting import lens_figure

    return Picture(title, lens_figure.save(figure, folder / FIGURES / name)[1], caption)


def _lens_figures(trials: Sequence[Trial], folder: Path) -> list[Picture]:
    """lens_profile.json and its figures, for the trials that have a profile."""
    profiles = {trial.name: read_profile(trial.profile) for trial in trials if trial.profile is not None}
    if not profiles:
        return []
    from pipeline.reporting import lens_figure

    write_profiles(folder / "lens_profile.json", profiles)
    return [
        _save(
            lens_figure.divergence_figure(profiles), folder, "lens_divergence",
            "Divergence to the teacher at every mapped layer",
            "Lower is closer to the teacher; the last layer is the prediction itself.",
        ),
        _save(
            lens_figure.confidence_figure(profiles), folder, "lens_confidence",
            "Over- and under-confidence at every mapped layer",
            "Left: where the student gives a token more probability than the teacher; right: where it gives less.",
        ),
    ]  # fmt: skip


def curves_of(trials: Sequence[Trial], metrics: Sequence[str], label: Label) -> dict[str, list[Curves]]:
    """Label → for each of its runs metric → curve."""
    curves: dict[str, list[Curves]] = {}
    for trial in trials:
        file = None if trial.train is None else trial.train.place.path / METRICS
        if file is not None and file.exists():
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            curves.setdefault(label(trial), []).append(
                {
                    name: [(record["step"], record["metrics"][name]) for record in records if name in record["metrics"]]
                    for name in metrics
                }
            )
    return curves


def costs_of(trials: Sequence[Trial], rows: Sequence[ResultRow], label: Label) -> dict[str, list[Cost]]:
    """Label → for each of its runs training time and average score."""
    from pipeline.reporting.figures import Cost

    means = {(row.method, row.train_seed): row.mean for row in rows if (row.benchmark, row.metric) == (AVERAGE, "rouge_l")}
    costs: dict[str, list[Cost]] = {}
    for trial in trials:
        artifact = None if trial.train is None else trial.train.place.existing()
        if artifact is not None:
            cost = Cost(float(artifact.manifest.counts["seconds"]), means[trial.row, trial.seed])
            costs.setdefault(label(trial), []).append(cost)
    return costs


def _seed_limits(trials: Sequence[Trial]) -> list[str]:
    seeds: dict[str, int] = {}
    for trial in trials:
        if trial.train is not None:
            seeds[trial.row] = seeds.get(trial.row, 0) + 1
    fewest = min(seeds.values(), default=_FEW_SEEDS)
    if fewest == 1:
        alone = [row for row, count in seeds.items() if count == 1]
        who = "every method" if len(alone) == len(seeds) else ", ".join(alone)
        return [
            f"One training seed for {who}: what is said holds for these checkpoints. How much a score changes when the same "
            "method is trained again is not measured."
        ]
    if fewest < _FEW_SEEDS:
        return [f"{fewest} training seeds: the deviation over them is itself uncertain, which widens the intervals."]
    return []


def _cut_limits(trials: Sequence[Trial]) -> list[str]:
    said = []
    for plan in _data(trials).values():
        artifact = obtain(plan.data.place)
        limit = plan.data.config.max_tokens
        if artifact is None:
            said.append(f"Training responses are cut at {limit} tokens per row; how many were is not known here.")
        else:
            counts = artifact.manifest.counts["train"]
            said.append(
                f"Truncated references: {counts['cut_response']} of {counts['kept']} training rows were cut at {limit} tokens "
                f"and have no end token; {counts['overlong_prompt']} of {counts['rows']} were left out for their long prompt. "
                "References of the benchmarks are scored whole."
            )
    lengths = sorted({plan.decoding.max_new_tokens for trial in trials for plan in trial.evaluations})
    cut = {
        trial.name: statistics.fmean(read_scores(plan.place.path)["share_cut"] for plan in trial.evaluations)
        for trial in trials
    }
    least, most = min(cut, key=lambda name: cut[name]), max(cut, key=lambda name: cut[name])
    shares = [f"{100 * cut[name]:.0f} %" for name in (least, most)]
    range_text = shares[0] if shares[0] == shares[1] else f"{shares[0]} ({least}) to {shares[1]} ({most})"
    said.append(
        f"Responses end at {' or '.join(map(str, lengths))} new tokens: {range_text} of a model's responses were cut there and "
        "cannot match a longer reference."
    )
    return said


def _data(trials: Sequence[Trial]) -> dict[str, TrainPlan]:
    """Fingerprint of training data → a run on it."""
    found: dict[str, TrainPlan] = {}
    for trial in trials:
        if trial.train is not None:
            found.setdefault(trial.train.data.place.fingerprint, trial.train)
    return found


def _overlap_limits(trials: Sequence[Trial]) -> list[str]:
    benchmarks = [plan.benchmark for plan in trials[0].evaluations]
    found: list[Overlap] = []
    unknown: list[str] = []
    for run in _data(trials).values():
        rows = obtain(run.data.place)
        known = None if rows is None else _seen(run, rows)
        for benchmark in benchmarks:
            prompts = obtain(benchmark.place)
            if known is None or prompts is None:
                unknown.append(benchmark.name)
            else:
                asked = _texts(run, benchmark.template, [row.input_ids for row in read_prompts(prompts.path / PROMPTS)])
                found += [overlap(benchmark.name, asked, part, others) for part, others in known.items()]
    said = [_overlap_text(one) for one in dict.fromkeys(found) if one.same_instruction]
    clean = [name for name in dict.fromkeys(one.benchmark for one in found) if not _contaminated(name, found)]
    if clean:
        said.append(
            f"No prompt of {', '.join(clean)} occurs in the training or dev rows (instructions and whole prompts, case and "
            "white space aside); what the teacher or the student saw before is not known."
        )
    if unknown:
        names = ", ".join(dict.fromkeys(unknown))
        said.append(f"Whether prompts of {names} occur in the training or dev rows was not checked: the rows are not here.")
    return said


def _contaminated(benchmark: str, found: Sequence[Overlap]) -> bool:
    return any(one.same_instruction for one in found if one.benchmark == benchmark)


def _overlap_text(one: Overlap) -> str:
    named = "; ".join(f"“{text if len(text) <= 90 else text[:89] + '…'}”" for text in one.named)
    more = ", among them" if one.same_instruction > len(one.named) else ":"
    return (
        f"Contaminated prompts: of the {one.prompts} prompts of {one.benchmark}, {one.same_instruction} "
        f"{'has' if one.same_instruction == 1 else 'have'} an instruction that occurs in the {one.part} rows too, "
        f"{one.same_prompt} of them with the same input{more} {named}. They are scored like the others."
    )


def _seen(run: TrainPlan, rows: Artifact) -> dict[str, Seen]:
    """Prompts of the training and the dev rows."""
    train = [row.input_ids[: row.prompt_tokens] for row in read_encoded(rows.path / TRAIN)]
    dev = [prompt.input_ids for prompt in read_prompts(rows.path / DEV_PROMPTS)]
    return {part: seen(_texts(run, run.data.config.template, ids)) for part, ids in (("training", train), ("dev", dev))}


def _texts(run: TrainPlan, template: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    # Both sides are decoded from their ids, so that what a tokenizer changes it changes on both.
    tokenizer = load_tokenizer(run.place.path / MODEL)
    skip = not holds_special_tokens(template)
    return [str(tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)) for ids in prompts]


def _versions(artifact: Artifact) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(artifact.manifest.versions.items()))


def _machine() -> str:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join(
        [platform.machine(), platform.system(), f"{os.cpu_count()} CPUs", f"{memory:.0f} GiB memory", *(devices or ["no GPU"])]
    )
