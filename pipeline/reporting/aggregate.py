"""Scores of many runs become one table: means over decoding seeds per run, means and deviations over training seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

AVERAGE = "avg"
METRICS = ("rouge_l", "exact_match")


@dataclass(frozen=True)
class RunScores:
    """One model's scores on one benchmark.

    Attributes:
        method: name of the method, "teacher" or "untrained".
        train_seed: training seed, None for models that were not trained here.
        benchmark: name of the benchmark.
        per_seed: metric → one score per decoding seed, in the seeds' order; one alone where seeds play no role.
    """

    method: str
    train_seed: int | None
    benchmark: str
    per_seed: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class ResultRow:
    """A row of results.csv: a metric of one run on one benchmark; std is over decoding seeds (None for one seed)."""

    method: str
    train_seed: int | None
    benchmark: str
    metric: str
    mean: float
    std: float | None
    n_decoding_seeds: int


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        mean: mean over training seeds of the mean over decoding seeds.
        train_std: standard deviation over training seeds, None for one.
        decoding_std: mean over training seeds of the standard deviation over decoding seeds, None for one decoding seed.
        n_train_seeds: runs behind the cell.
    """

    mean: float
    train_std: float | None
    decoding_std: float | None
    n_train_seeds: int


def result_rows(scores: Iterable[RunScores]) -> list[ResultRow]:
    """One row per run, benchmark and metric, and one per run and metric for the average over benchmarks.

    The average is over the benchmarks that all runs have, so that averages compare. It is taken per decoding seed over
    benchmarks first, so that its deviation is that of the average. Where benchmarks have different numbers of decoding seeds
    it is that of their means, without a deviation.
    """
    scores = list(scores)
    rows = [_row(run, metric, values) for run in scores for metric, values in run.per_seed.items()]
    runs: dict[tuple[str, int | None], list[RunScores]] = {}
    for run in scores:
        runs.setdefault((run.method, run.train_seed), []).append(run)
    common = set.intersection(*({run.benchmark for run in group} for group in runs.values())) if runs else set()
    for group in runs.values():
        averaged = [run for run in group if run.benchmark in common]
        for metric in averaged[0].per_seed if averaged else ():
            found = [run.per_seed[metric] for run in averaged if metric in run.per_seed]
            if len(found) == len(averaged):
                rows.append(_row(replace(group[0], benchmark=AVERAGE), metric, _averages(found)))
    return rows


def _averages(found: Sequence[Sequence[float]]) -> list[float]:
    if len({len(values) for values in found}) > 1:
        return [statistics.fmean(statistics.fmean(values) for values in found)]
    return [statistics.fmean(values) for values in zip(*found, strict=True)]


def table(rows: Iterable[ResultRow], metric: str = "rouge_l") -> dict[str, dict[str, Cell]]:
    """Method → benchmark → cell, methods and benchmarks in order of appearance."""
    grouped: dict[str, dict[str, list[ResultRow]]] = {}
    for row in rows:
        if row.metric == metric:
            grouped.setdefault(row.method, {}).setdefault(row.benchmark, []).append(row)
    return {method: {name: _cell(cells) for name, cells in benchmarks.items()} for method, benchmarks in grouped.items()}


def _row(run: RunScores, metric: str, values: Sequence[float]) -> ResultRow:
    return ResultRow(run.method, run.train_seed, run.benchmark, metric, statistics.fmean(values), _std(values), len(values))


def _cell(rows: Sequence[ResultRow]) -> Cell:
    means = [row.mean for row in rows]
    deviations = [row.std for row in rows if row.std is not None]
    return Cell(statistics.fmean(means), _std(means), statistics.fmean(deviations) if deviations else None, len(rows))


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
