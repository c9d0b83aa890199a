from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.objective import IGNORE_INDEX, LensTerm, Objective, sampled_positions
from pipeline.models.lens import logit_lens
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.step import Student, Teacher, micro_batch_loss

ROWS = [EncodedExample(f"e{i}", tuple(range(3 + i, 14 + 2 * i)), 2 + i % 3) for i in range(6)]
LENS = LensTerm(1.0, "jensen_shannon", ((1, 2), (2, 4)), False, "aligned")


def labels(*lengths: int, width: int = 12) -> Tensor:
    grid = torch.full((len(lengths), width), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        grid[row, 2 : 2 + length] = 1
    return grid


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
def test_every_position_of_every_pair_has_the_same_probability(fraction: float) -> None:
    grid, draws, pairs = labels(7, 3, 1), 3000, 2
    counts = torch.zeros(pairs, grid.numel())
    for draw in range(draws):
        for pair, taken in enumerate(sampled_positions(grid, pairs, fraction, [3 * draw, 3 * draw + 1, 3 * draw + 2])):
            counts[pair, taken] += 1
    share = counts / draws
    response = (grid != IGNORE_INDEX).flatten()
    assert share[:, ~response].sum() == 0
    assert (share[:, response] - fraction).abs().max() < 5 * (fraction * (1 - fraction) / draws) ** 0.5


def test_a_row_takes_nearly_the_same_number_each_time_and_ascending() -> None:
    for seed in range(50):
        for taken in sampled_positions(labels(10), 3, 0.33, [seed]):
            assert len(taken) in (3, 4)
            assert taken.tolist() == sorted(set(taken.tolist()))


def test_pairs_and_seeds_draw_differently_and_the_same_seed_equally() -> None:
    first, again, other = (sampled_positions(labels(10), 2, 0.5, [seed]) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_a_row_without_a_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 row seeds for 2 rows"):
        sampled_positions(labels(3, 3), 1, 0.5, [0])


def lens_loss(lens: LensTerm, batch: Batch, draw: int = 0, denominator: int | None = None) -> float:
    student, teacher = tiny.llama(layers=2, seed=1), tiny.llama(layers=4, seed=2)
    terms = micro_batch_loss(
        Student(student, logit_lens(student)),
        Teacher(OnlineTeacher(teacher), logit_lens(teacher)),
        Objective(1.0, None, lens=lens),
        batch,
        denominator=denominator or sum(batch.response_counts),
        autocast=None,
        draw=draw,
    )
    return float(terms.parts["lens"])


def test_the_estimate_averages_to_the_full_term() -> None:
    batch = collate(ROWS, 0)
    full = lens_loss(LENS, batch)
    estimates = torch.tensor([lens_loss(replace(LENS, token_fraction=0.5), batch, draw) for draw in range(150)])
    assert estimates.std() > 0
    assert abs(float(estimates.mean()) - full) < 4 * float(estimates.std()) / len(estimates) ** 0.5


def test_the_draw_is_the_same_however_the_step_is_cut() -> None:
    lens = replace(LENS, token_fraction=0.4)
    whole = collate(ROWS, 0)
    parts = [collate(ROWS[:2], 0), collate(ROWS[2:], 0)]
    total = sum(whole.response_counts)
    split = sum(lens_loss(lens, part, draw=3, denominator=total) for part in parts)
    assert split == pytest.approx(lens_loss(lens, whole, draw=3), rel=1e-6)


def test_a_draw_without_any_position_is_zero() -> None:
    row = EncodedExample("one", (3, 4, 5), 2)
    found = {lens_loss(replace(LENS, token_fraction=0.01), collate([row], 0), draw) for draw in range(5)}
    assert 0.0 in found
