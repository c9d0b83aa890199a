from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.config.sweep import Sweep
from pipeline.sweeps.points import Point, fixed_points, search


def sweep(axes: dict[str, Any], **settings: Any) -> Sweep:
    return Sweep.model_validate({"name": "s", "experiment": "e.yaml", "axes": axes, **settings})


def test_a_grid_is_every_combination_in_the_order_of_the_axes() -> None:
    points = fixed_points(sweep({"a": [1, 2], "b": ["x", "y"]}))
    assert points == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


def test_without_axes_there_is_the_base_alone() -> None:
    assert fixed_points(sweep({})) == [{}]


def test_a_condition_leaves_its_axis_out_elsewhere() -> None:
    axes = {"method": ["kd", "jsd", "d"], "w": {"values": [1, 2], "when": {"method": ["d", "jsd"]}}}
    assert fixed_points(sweep(axes)) == [
        {"method": "kd"},
        {"method": "jsd", "w": 1},
        {"method": "jsd", "w": 2},
        {"method": "d", "w": 1},
        {"method": "d", "w": 2},
    ]


def test_a_condition_on_an_absent_axis_does_not_hold() -> None:
    axes = {"a": [1, 2], "b": {"values": [3], "when": {"a": 1}}, "c": {"values": [5, 6], "when": {"b": 3}}}
    assert fixed_points(sweep(axes)) == [{"a": 1, "b": 3, "c": 5}, {"a": 1, "b": 3, "c": 6}, {"a": 2}]


def test_listed_points_are_taken_as_they_are() -> None:
    points = [{"method": "kd"}, {"train.learning_rate": 1e-4}]
    assert fixed_points(sweep({}, search={"kind": "list", "points": points})) == points


RANGES = {
    "x": {"low": 1e-5, "high": 1e-1, "log": True},
    "y": {"low": -2.0, "high": 3.0},
    "n": {"low": 1, "high": 4, "integer": True},
    "m": {"low": 1, "high": 1000, "integer": True, "log": True},
    "c": ["a", "b"],
}


def test_random_points_fill_their_ranges() -> None:
    points = fixed_points(sweep(RANGES, search={"kind": "random", "points": 1000}))
    assert len(points) == 1000
    logs = [math.log10(point["x"]) for point in points]
    assert all(-5 <= value <= -1 for value in logs) and abs(sum(logs) / len(logs) + 3) < 0.1
    assert all(-2 <= point["y"] < 3 for point in points)
    assert {point["n"] for point in points} == {1, 2, 3, 4} and {point["c"] for point in points} == {"a", "b"}
    below = sum(point["m"] <= 31 for point in points) / len(points)
    assert (
        min(point["m"] for point in points) == 1
        and 950 < max(point["m"] for point in points) <= 1000
        and abs(below - 0.5) < 0.05
    )


def test_more_random_points_keep_the_earlier_ones_and_another_seed_has_others() -> None:
    def drawn(count: int, seed: int = 0) -> Sequence[Point]:
        return fixed_points(sweep(RANGES, search={"kind": "random", "points": count, "seed": seed}))

    assert list(drawn(9))[:4] == drawn(4) != drawn(4, seed=1)


def test_another_axis_moves_no_draw() -> None:
    few = {name: RANGES[name] for name in ("x", "c")}
    drawn = fixed_points(sweep(RANGES, search={"kind": "random", "points": 5}))
    assert [{name: point[name] for name in few} for point in drawn] == fixed_points(
        sweep(few, search={"kind": "random", "points": 5})
    )


def test_equal_random_points_are_one() -> None:
    assert len(fixed_points(sweep({"a": [1, 2]}, search={"kind": "random", "points": 50}))) == 2


def bowl(point: Point) -> float:
    return (math.log10(point["x"]) + 3) ** 2


def optuna_points(points: int, batch: int, minimise: bool = True, fails: bool = False) -> list[Point]:
    pytest.importorskip("optuna", reason="optuna is not installed")
    seen: list[Point] = []

    def run(asked: Sequence[Point]) -> list[float | None]:
        assert len(asked) <= batch
        seen.extend(asked)
        return [None if fails else bowl(point) * (1 if minimise else -1) for point in asked]

    settings = sweep({"x": RANGES["x"]}, search={"kind": "optuna", "points": points, "batch": batch, "seed": 3})
    search(settings, run, minimise)
    return seen


@pytest.mark.parametrize("minimise", [True, False])
def test_optuna_closes_in_on_the_best(minimise: bool) -> None:
    found = [bowl(point) for point in optuna_points(40, batch=2, minimise=minimise)]
    assert len(found) == 40
    assert sum(found[-10:]) / 10 < 0.5 * sum(found[:10]) / 10


def test_optuna_suggests_the_same_again_for_the_same_results() -> None:
    assert optuna_points(15, batch=3) == optuna_points(15, batch=3)
    assert optuna_points(8, batch=2) == optuna_points(15, batch=2)[:8]


def test_optuna_goes_on_after_failures() -> None:
    assert len(optuna_points(5, batch=2, fails=True)) == 5


def test_a_spent_budget_ends_the_search() -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    calls: list[int] = []

    def run(asked: Sequence[Point]) -> list[float | None] | None:
        calls.append(len(asked))
        return None if len(calls) == 2 else [1.0 for _ in asked]

    search(sweep({"x": RANGES["x"]}, search={"kind": "optuna", "points": 9, "batch": 1}), run, minimise=True)
    assert calls == [1, 1]


def test_optuna_respects_conditions_and_values_of_any_kind() -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    pairs = [{"kind": "uniform", "count": 2}, {"kind": "last", "count": 2}]
    axes = {"m": ["kd", "d"], "p": {"values": pairs, "when": {"m": "d"}}}
    seen: list[Point] = []

    def run(asked: Sequence[Point]) -> list[float | None]:
        seen.extend(asked)
        return [0.0 for _ in asked]

    search(sweep(axes, search={"kind": "optuna", "points": 12}), run, minimise=True)
    assert {point["m"] for point in seen} == {"kd", "d"}
    assert all(("p" in point) == (point["m"] == "d") for point in seen)
    assert all(point["p"] in pairs for point in seen if "p" in point)
