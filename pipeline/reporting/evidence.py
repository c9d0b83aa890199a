"""What can be said of the rows of a comparison: which of them are tested against the baseline, and what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import DataError
from pipeline.reporting.compare import Comparison, Standing, compare_methods, headline, prompt_scores, ties
from pipeline.reporting.record import Facts, Records
from pipeline.reporting.statistics import PromptScores


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
        left_out: rows of other experiments that cannot be tested against the baseline → why.
    """

    headline: str
    scores: Sequence[PromptScores] = ()
    tested: Sequence[PromptScores] = ()
    comparison: Comparison | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)
    problem: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)


def evidence(records: Records) -> Evidence:
    """Compare the rows prompt by prompt; rows with other prompts or decoding seeds have scores but no comparison.

    Of several experiments, rows that were evaluated otherwise than the baseline are left out, and so are benchmarks that not
    every row has.
    """
    facts, baseline = records.facts, records.facts.baseline
    scores: list[PromptScores] = []
    try:
        scores = _prompt_scores(records)
        if baseline is None:
            return Evidence("No method was trained here: the table shows the models as they are.", scores)
        if facts.merged and not facts.common:
            return Evidence("No benchmark is common to all rows: nothing is averaged and nothing is tested.", scores)
        trained = {trial.row for trial in facts.trials if trial.training is not None}
        tested = [own for own in scores if own.method in trained or own.method == baseline]
        left_out = _left_out(facts, tested, baseline) if facts.merged else {}
        if facts.merged:
            tested = [own for own in tested if own.benchmark in facts.common and own.method not in left_out]
        comparison = compare_methods(tested, baseline)
        standings = ties(tested, comparison) if comparison.averages else {}
    except DataError as error:
        told = "The methods are not compared: their evaluations cannot be paired prompt by prompt."
        return Evidence(told, scores, problem=str(error))
    told = headline(comparison)
    if left_out and not comparison.averages:
        told = f"No other row was evaluated as {baseline} was, so none is tested against it."
    return Evidence(told, scores, tested, comparison, standings, left_out=left_out)


def paired_scores(records: Records) -> Sequence[PromptScores]:
    """Scores of every row on every benchmark; none where rows cannot be put side by side."""
    try:
        return _prompt_scores(records)
    except DataError:
        return ()  # the report says why, see `evidence`


def _prompt_scores(records: Records) -> list[PromptScores]:
    found = []
    for row, trials in records.facts.rows.items():
        for name in dict.fromkeys(own.benchmark for trial in trials for own in trial.evaluations):
            tables = {
                trial.seed: records.generations.tables[trial.by_benchmark[name].fingerprint]
                for trial in trials
                if name in trial.by_benchmark
            }
            found.append(prompt_scores(row, name, tables))
    return found


def _left_out(facts: Facts, scores: Sequence[PromptScores], baseline: str) -> dict[str, str]:
    protocols = {row: {own.benchmark: own.protocol_hash for own in trials[0].evaluations} for row, trials in facts.rows.items()}
    prompts = {(own.method, own.benchmark): set(own.ids) for own in scores}
    reasons: dict[str, str] = {}
    for row in dict.fromkeys(own.method for own in scores):
        for name in facts.common:
            if protocols[row][name] != protocols[baseline][name]:
                reasons.setdefault(row, f"another protocol on {name}")
            elif prompts[row, name] != prompts[baseline, name]:
                reasons.setdefault(row, f"other prompts on {name}")
    return reasons
