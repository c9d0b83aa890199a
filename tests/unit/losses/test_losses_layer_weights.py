"""`lens.layer_weights`: a weighted mean over pairs, with the scale of the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.objective import LensTerm, Objective
from pipeline.models.lens import logit_lens
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.step import Student, Teacher, micro_batch_loss

ROWS = [EncodedExample(f"e{i}", tuple(range(3 + i, 14 + 2 * i)), 2 + i % 3) for i in range(4)]
LENS = LensTerm(1.0, "jensen_shannon", ((1, 2), (2, 4)), False, "aligned")


def lens_loss(lens: LensTerm, draw: int = 0) -> tuple[float, torch.Tensor]:
    """The lens part and the gradient of the student's embeddings."""
    model = tiny.gpt2(layers=3, seed=7)
    student = Student(model, logit_lens(model))
    big = tiny.gpt2(layers=6, seed=8)
    teacher = Teacher(OnlineTeacher(big), logit_lens(big))
    batch = collate(ROWS, 0)
    terms = micro_batch_loss(
        student, teacher, Objective(1.0, None, lens=lens), batch,
        denominator=sum(batch.response_counts), autocast=None, draw=draw,
    )  # fmt: skip
    terms.total.backward()
    return float(terms.parts["lens"]), model.transformer.wte.weight.grad.clone()


def test_equal_weights_change_nothing() -> None:
    plain, plain_grad = lens_loss(LENS)
    weighted, weighted_grad = lens_loss(replace(LENS, layer_weights=(3.0, 3.0)))
    assert weighted == pytest.approx(plain, rel=1e-6)
    assert torch.allclose(weighted_grad, plain_grad, rtol=1e-5, atol=1e-9)


def test_the_mean_over_pairs_is_weighted() -> None:
    alone = [lens_loss(replace(LENS, pairs=(pair,))) for pair in LENS.pairs]
    value, gradient = lens_loss(replace(LENS, layer_weights=(1.0, 3.0)))
    assert alone[0][0] != pytest.approx(alone[1][0], rel=1e-3)
    assert value == pytest.approx(0.25 * alone[0][0] + 0.75 * alone[1][0], rel=1e-6)
    assert torch.allclose(gradient, 0.25 * alone[0][1] + 0.75 * alone[1][1], rtol=1e-4, atol=1e-8)


def test_a_pair_of_weight_zero_does_not_count() -> None:
    assert lens_loss(replace(LENS, layer_weights=(0.0, 2.0)))[0] == pytest.approx(lens_loss(replace(LENS, pairs=((2, 4),)))[0])


def test_the_weighted_estimate_of_a_token_fraction_is_unbiased() -> None:
    weighted = replace(LENS, layer_weights=(1.0, 3.0))
    draws = torch.tensor([lens_loss(replace(weighted, token_fraction=0.5), draw)[0] for draw in range(60)])
    standard_error = float(draws.std() / len(draws) ** 0.5)
    assert float(draws.mean()) == pytest.approx(lens_loss(weighted)[0], abs=4 * standard_error)
