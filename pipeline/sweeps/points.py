"""The settings that a sweep tries: grid, list, random draws, or Optuna's suggestions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.config.sweep import MAX_POINTS, Axis, Grid, Listed, OptunaSearch, RandomSearch, Range, Sweep, Values
from pipeline.errors import ConfigError

Point = Mapping[str, Any]
"""Axis → value; an axis whose condition does not hold is absent."""
RunBatch = Callable[[Sequence[Point]], Sequence[float | None] | None]
"""Runs points and returns the objective of each, None where it failed; None altogether ends the search."""


def search(sweep: Sweep, run: RunBatch, minimise: bool) -> None:
    """Run every point of a sweep, in batches; only Optuna looks at what `run` returns.

    Args:
        sweep: the sweep.
        run: runs a batch.
        minimise: whether a smaller objective is better.

    Raises:
        ConfigError: Optuna is asked for and not installed.
    """
    if isinstance(sweep.search, OptunaSearch):
        _optuna(sweep.axes, sweep.search, run, minimise)
    else:
        run(fixed_points(sweep))


def fixed_points(sweep: Sweep) -> list[Point]:
    """The points that do not depend on results; of an Optuna search there are none beforehand."""
    if isinstance(sweep.search, Grid):
        return _grid(sweep.axes)
    if isinstance(sweep.search, Listed):
        return list(sweep.search.points)
    if isinstance(sweep.search, RandomSearch):
        return _distinct([_draw(sweep.axes, sweep.search.seed, index) for index in range(sweep.search.points)])
    return []


def applies(axis: Axis, point: Point) -> bool:
    """Whether the axis' condition holds at a point with the axes before it."""
    return all(
        name in point and (point[name] in wanted if isinstance(wanted, list) else point[name] == wanted)
        for name, wanted in axis.when.items()
    )


def _grid(axes: Mapping[str, Axis]) -> list[Point]:
    _check_size(axes)
    points: list[dict[str, Any]] = [{}]
    for name, axis in axes.items():
        assert isinstance(axis, Values)  # the configuration refuses ranges in a grid
        points = [
            extended
            for point in points
            for extended in ([{**point, name: value} for value in axis.values] if applies(axis, point) else [point])
        ]
    return _distinct(points)


def _check_size(axes: Mapping[str, Axis]) -> None:
    """Refuse a grid before it is built; an axis with a condition counts in full."""
    count = math.prod(len(axis.values) for axis in axes.values() if isinstance(axis, Values))
    if count > MAX_POINTS:
        raise ConfigError(
            f"axes: a grid of {count} points, but a sweep has at most {MAX_POINTS}; give fewer values, or search.kind: random "
            "with search.points"
        )


def _draw(axes: Mapping[str, Axis], seed: int, index: int) -> Point:
    point: dict[str, Any] = {}
    for name, axis in axes.items():
        if applies(axis, point):
            # Each draw belongs to (seed, index, axis): more points or another axis leave the earlier draws as they are.
            digest = hashlib.sha256(f"{seed}\0{index}\0{name}".encode()).digest()
            point[name] = _at(axis, int.from_bytes(digest[:8], "big") / 2**64)
    return point


def _at(axis: Axis, share: float) -> Any:
    """The value at `share` (0 ≤ share < 1) of an axis."""
    if isinstance(axis, Values):
        return axis.values[int(share * len(axis.values))]
    if axis.integer:
        low, high = int(axis.low), int(axis.high)
        if axis.log:
            return min(high, int(math.exp(math.log(low) + share * (math.log(high + 1) - math.log(low)))))
        return low + int(share * (high - low + 1))
    value = math.exp(math.log(axis.low) + share * math.log(axis.high / axis.low)) if axis.log else (
        axis.low + share * (axis.high - axis.low)
    )  # fmt: skip
    return float(f"{value:.6g}")  # readable in names and files; the same number everywhere


def _optuna(axes: Mapping[str, Axis], settings: OptunaSearch, run: RunBatch, minimise: bool) -> None:
    try:
        import optuna
    except ImportError:
        raise ConfigError('search.kind is optuna, which is not installed; pip install ".[sweep]", or use random') from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # In memory: with the seed, and results told in the same order, a second call suggests the same points, whose trials are
    # then found finished.
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=settings.seed), direction="minimize" if minimise else "maximize"
    )
    asked = 0
    while asked < settings.points:
        trials = [study.ask() for _ in range(min(settings.batch, settings.points - asked))]
        asked += len(trials)
        values = run([_suggest(axes, trial) for trial in trials])
        if values is None:
            return
        for trial, value in zip(trials, values, strict=True):
            if value is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, value)


def _suggest(axes: Mapping[str, Axis], trial: Any) -> Point:
    point: dict[str, Any] = {}
    for name, axis in axes.items():
        if applies(axis, point):
            point[name] = _suggested(name, axis, trial)
    return point


def _suggested(name: str, axis: Axis, trial: Any) -> Any:
    if isinstance(axis, Range):
        if axis.integer:
            return trial.suggest_int(name, int(axis.low), int(axis.high), log=axis.log)
        return float(f"{trial.suggest_float(name, axis.low, axis.high, log=axis.log):.6g}")
    # Optuna's categories are numbers or texts: values of any kind go by their index.
    return axis.values[trial.suggest_categorical(name, list(range(len(axis.values))))]


def _distinct(points: Sequence[Point]) -> list[Point]:
    return list({json.dumps(point, sort_keys=True, default=str): point for point in points}.values())
