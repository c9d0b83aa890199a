"""Methods against a baseline: effects with intervals and corrected p-values, ties with the best, one honest sentence.

Two families of tests are each held to 5 % by Holm's correction: the averages over benchmarks of all methods against the
baseline (primary), and all methods × benchmarks (what the average hides). Intervals are 95 % each, without correction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError, DataError
from pipeline.reporting.aggregate import AVERAGE, Cell, RunScores, result_rows, table
from pipeline.reporting.statistics import ALPHA, RESAMPLES, Effect, PromptScores, Verdict, holm, macro_bootstrap, verdict


@dataclass(frozen=True)
class Contrast:
    """A method against the baseline.

    Attributes:
        method: its name.
        benchmark: AVERAGE for the mean over benchmarks.
        effect: method minus baseline.
        adjusted_p: Holm's, in the family of the averages or of the benchmarks.
        verdict: of the method, by adjusted_p.
    """

    method: str
    benchmark: str
    effect: Effect
    adjusted_p: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Every method against the baseline.

    Attributes:
        baseline: name of the method that the others are compared with.
        averages: one for each other method, on the mean over benchmarks; the primary family.
        benchmarks: one for each other method and benchmark.
    """

    baseline: str
    averages: tuple[Contrast, ...]
    benchmarks: tuple[Contrast, ...]


@dataclass(frozen=True)
class Standing:
    """A column of the table.

    Attributes:
        best: the method with the highest mean, bold.
        tied: methods that the test does not separate from it, underlined.
    """

    best: str
    tied: tuple[str, ...]


@dataclass(frozen=True)
class Regression:
    """Scores of tonight against the last accepted ones.

    Attributes:
        effect: new minus accepted.
        regressed: whether new is lower by more than noise.
    """

    effect: Effect
    regressed: bool


def prompt_scores(method: str, benchmark: str, tables: Mapping[int | None, pa.Table], metric: str = "rouge_l") -> PromptScores:
    """Arrange the rows of generations.parquet files.

    Args:
        method: its name.
        benchmark: name of the benchmark.
        tables: training seed (None for a model that was not trained here) → a row per prompt × decoding seed with columns
            id, seed and the metric, in any order.
        metric: column.

    Raises:
        DataError: no tables, a prompt without a score for each decoding seed, or checkpoints evaluated on other prompts or
            with another number of decoding seeds.
    """
    if not tables:
        raise DataError(f"{method} on {benchmark}: no generations to compare; evaluate it first")
    first = next(iter(tables.values()))
    ids = tuple(dict.fromkeys(first["id"].to_pylist()))
    grids = [_grid(found, ids, metric, f"{method} s{seed} on {benchmark}") for seed, found in tables.items()]
    if len({len(grid) for grid in grids}) > 1:
        raise DataError(
            f"{method} on {benchmark}: the checkpoints of training seeds {list(tables)} have "
            f"{[len(grid) for grid in grids]} decoding seeds; evaluate all alike"
        )
    return PromptScores(method, benchmark, tuple(tables), ids, np.array(grids, dtype=np.float64))


def cells(scores: Sequence[PromptScores], metric: str = "rouge_l") -> dict[str, dict[str, Cell]]:
    """Method → benchmark or AVERAGE → mean, deviation over training seeds (None for one) and, apart, over decoding seeds."""
    runs = [
        RunScores(own.method, seed, own.benchmark, {metric: own.scores[index].mean(axis=1).tolist()})
        for own in scores
        for index, seed in enumerate(own.train_seeds)
    ]
    return table(result_rows(runs), metric)


def compare_methods(scores: Sequence[PromptScores], baseline: str, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare every method with the baseline, on each benchmark and on their mean.

    Args:
        scores: of every method on every benchmark. Each further method makes the correction stronger, so models that are
            there for orientation (the teacher) belong in here only as the baseline.
        baseline: name of a method.
        resamples: bootstrap draws, see `pipeline.reporting.statistics.paired_bootstrap`.
        seed: of the draws.

    Raises:
        ConfigError: no such baseline.
        DataError: methods that were not evaluated on the same benchmarks and prompts.
    """
    methods = _by_method(scores)
    if baseline not in methods:
        raise ConfigError(f"baseline {baseline}: no such method; there are {', '.join(methods) or 'none'}")
    columns, others = _columns(methods), [method for method in methods if method != baseline]
    averages, benchmarks = (
        _family(
            [
                (method, name, macro_bootstrap(_of(methods[method], name), _of(methods[baseline], name), resamples, seed))
                for method in others
                for name in family
            ]
        )
        for family in ([AVERAGE], columns[:-1])
    )
    return Comparison(baseline, averages, benchmarks)


def ties(
    scores: Sequence[PromptScores], comparison: Comparison, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Standing]:
    """Benchmark or AVERAGE → the method with the highest mean, and those that are not separated from it.

    The data choose the best, so each other method is tested against it with Bonferroni's correction over all of them: the
    truly best one is left out in at most 5 of 100 comparisons (multiple comparisons with the best, Hsu 1984). Pairs with
    the baseline are not tested again; what `compare_methods` says of them holds here too.

    Args:
        scores: as `compare_methods` got them.
        comparison: what it found.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        DataError: see `compare_methods`.
    """
    methods = _by_method(scores)
    return {name: _standing(methods, name, comparison, resamples, seed) for name in _columns(methods)}


def headline(comparison: Comparison, metric: str = "ROUGE-L") -> str:
    """One sentence on the mean over benchmarks: the best method that is separated from the baseline, else the highest.

    A method that is not separated is never said to be better.
    """
    if not comparison.averages:
        return f"{comparison.baseline} is the only method: there is nothing to compare it with."
    shown = max(comparison.averages, key=lambda found: (found.verdict == "better", found.effect.difference))
    effect, count = shown.effect, len(comparison.averages)
    interval = f"{_number(effect.low)} to {_number(effect.high)}"
    p_value = _p_text(shown.adjusted_p) + (f" after Holm over {count} methods" if count > 1 else "")
    budget = _budget(effect)
    if shown.verdict == "not separated":
        sentence = (
            f"{shown.method} and {comparison.baseline} are not separated at this budget: difference "
            f"{_number(effect.difference)} {metric} (95 % interval {interval}), {p_value}, {budget}"
        )
    else:
        side = "above" if shown.verdict == "better" else "below"
        sentence = (
            f"{shown.method} scores {_number(abs(effect.difference))} {metric} {side} {comparison.baseline} "
            f"(95 % interval of the difference {interval}, {p_value}, {budget})"
        )
    if effect.training_variance:
        return f"{sentence}."
    return f"{sentence}; the variance of training is unmeasured, so this holds for these checkpoints only."


def regression(
    new: Sequence[PromptScores], accepted: Sequence[PromptScores], resamples: int = RESAMPLES, seed: int = 0
) -> Regression:
    """Whether a method's new scores are below the last accepted ones by more than noise: one-sided, 5 %.

    A method that has not changed is called regressed in 5 of 100 nights. With one training seed the noise is that of
    prompts and decoding alone.

    Args:
        new: tonight's scores, one for each benchmark.
        accepted: the last accepted ones on the same prompts.
        resamples: bootstrap draws, see `pipeline.reporting.statistics.paired_bootstrap`.
        seed: of the draws.

    Raises:
        DataError: other benchmarks or prompts.
    """
    effect = macro_bootstrap(new, accepted, resamples, seed)
    return Regression(effect, effect.p_lower <= ALPHA)


def _grid(found: pa.Table, ids: Sequence[str], metric: str, what: str) -> list[list[float]]:
    """[decoding seeds][prompts] of one checkpoint."""
    rows = zip(*(found[name].to_pylist() for name in ("id", "seed", metric)), strict=True)
    values = {(name, seed): value for name, seed, value in rows}
    seeds = sorted({seed for _, seed in values})
    if set(values) != {(name, seed) for name in ids for seed in seeds} or len(values) != len(found):
        raise DataError(
            f"{what}: {len(found)} rows, expected one for each of {len(ids)} prompts and {len(seeds)} decoding seeds; "
            "evaluate the checkpoint again on the prompts of the others"
        )
    return [[values[name, seed] for name in ids] for seed in seeds]


def _by_method(scores: Sequence[PromptScores]) -> dict[str, list[PromptScores]]:
    methods: dict[str, list[PromptScores]] = {}
    for own in scores:
        methods.setdefault(own.method, []).append(own)
    return methods


def _columns(methods: Mapping[str, Sequence[PromptScores]]) -> list[str]:
    return [*dict.fromkeys(own.benchmark for found in methods.values() for own in found), AVERAGE]


def _of(scores: Sequence[PromptScores], column: str) -> list[PromptScores]:
    return [own for own in scores if column in (own.benchmark, AVERAGE)]


def _family(effects: Sequence[tuple[str, str, Effect]]) -> tuple[Contrast, ...]:
    adjusted = holm([effect.p_value for _, _, effect in effects])
    return tuple(
        Contrast(method, name, effect, p_value, verdict(effect, p_value))
        for (method, name, effect), p_value in zip(effects, adjusted, strict=True)
    )


def _standing(
    methods: Mapping[str, Sequence[PromptScores]], column: str, comparison: Comparison, resamples: int, seed: int
) -> Standing:
    found = {method: _of(scores, column) for method, scores in methods.items()}
    best = max(found, key=lambda method: float(np.mean([own.scores.mean() for own in found[method]])))
    said = {c.method: c.verdict for c in (*comparison.averages, *comparison.benchmarks) if c.benchmark == column}

    def separated(method: str) -> bool:
        if best == comparison.baseline:
            return said[method] == "worse"
        if method == comparison.baseline:
            return said[best] == "better"
        effect = macro_bootstrap(found[best], found[method], resamples, seed)
        return verdict(effect, min(1.0, (len(found) - 1) * effect.p_value)) == "better"

    return Standing(best, tuple(method for method in found if method != best and not separated(method)))


def _budget(effect: Effect) -> str:
    seeds = f"{effect.n_training_seeds} training seed{'s' if effect.n_training_seeds != 1 else ''}, "
    return f"{seeds if effect.n_training_seeds else ''}{effect.n_prompts} prompt{'s' if effect.n_prompts != 1 else ''}"


def _p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _number(value: float) -> str:
    """Two decimals with a true minus and no negative zero."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
