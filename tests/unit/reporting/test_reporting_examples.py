"""Generations are chosen by a rule: gains, losses, drawn ones."""

from __future__ import annotations

import numpy as np

from pipeline.reporting.examples import GAIN, GAINS, LOSS, LOSSES, RANDOM, SHOWN, choose
from pipeline.reporting.statistics import PromptScores


def scores(method: str, values: list[float], benchmark: str = "a") -> PromptScores:
    ids = tuple(f"{benchmark}{index}" for index in range(len(values)))
    return PromptScores(method, benchmark, (1, 2), ids, np.array([[values], [values]]))


BASE = [10.0] * 60
ONE = [10.0 + index - 30 for index in range(60)]
OTHER = ONE[::-1]


def test_gains_losses_and_drawn_prompts_come_in_their_numbers() -> None:
    found = choose([scores("kd", BASE), scores("x", ONE)], "kd")
    assert [choice.rule for choice in found] == [GAIN] * GAINS + [LOSS] * LOSSES + [RANDOM] * 6
    assert [choice.gain for choice in found[:GAINS]] == [29, 28, 27, 26, 25, 24, 23]
    assert [choice.gain for choice in found[GAINS : GAINS + LOSSES]] == [-30, -29, -28, -27, -26, -25, -24]
    assert len({choice.id for choice in found}) == 20
    assert all((choice.method, choice.gain) == (None, None) for choice in found[-6:])


def test_methods_take_turns_and_no_prompt_is_shown_twice() -> None:
    found = choose([scores("kd", BASE), scores("x", ONE), scores("y", OTHER), scores("z", ONE)], "kd")
    assert [choice.method for choice in found[:GAINS]] == ["x", "y", "z", "x", "y", "z", "x"]
    assert [choice.id for choice in found[:3]] == ["a59", "a0", "a58"]
    assert len({(choice.benchmark, choice.id) for choice in found}) == 20


def test_a_gain_is_the_mean_over_training_seeds() -> None:
    base, own = scores("kd", [0.0, 0.0]), PromptScores("x", "a", (1, 2), ("a0", "a1"), np.array([[[8.0, 1.0]], [[-4.0, 5.0]]]))
    first = choose([base, own], "kd")[0]
    assert (first.id, first.gain) == ("a1", 3.0)


def test_prompts_without_a_difference_are_neither_gain_nor_loss() -> None:
    found = choose([scores("kd", BASE), scores("x", BASE)], "kd")
    assert [choice.rule for choice in found] == [RANDOM] * SHOWN


def test_without_a_baseline_every_prompt_is_drawn() -> None:
    assert [choice.rule for choice in choose([scores("teacher", BASE)], None)] == [RANDOM] * 20
    assert len(choose([scores("teacher", BASE[:3])], None)) == 3 and choose([], None) == []


def test_the_same_seed_draws_the_same_prompts() -> None:
    tables = [scores("kd", BASE), scores("kd", BASE, "b")]
    assert choose(tables, None) == choose(tables[::-1], None)
    assert {choice.id for choice in choose(tables, None)} != {choice.id for choice in choose(tables, None, seed=1)}
    assert {choice.benchmark for choice in choose(tables, None)} == {"a", "b"}
