"""Logits far apart: nothing in the elementwise work may produce denormal numbers, which take a processor 100 times as long."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.losses.divergences import DIVERGENCES, log_probs, probs
from pipeline.losses.elementwise import CrossEntropyKernel, DivergenceKernel, LogitShape

PLAIN = LogitShape(1.0, None)
TINY = torch.finfo(torch.float32).tiny


def spread_logits(rows: int = 8, vocab: int = 4096) -> Tensor:
    """Evenly spread from 0 to -160: every distance at which float32 underflows occurs."""
    line = torch.linspace(0.0, -160.0, vocab)
    return torch.stack([line[torch.randperm(vocab, generator=torch.Generator().manual_seed(row))] for row in range(rows)])


def denormals(tensor: Tensor) -> int:
    return int(((tensor != 0) & (tensor.abs() < TINY)).sum())


def test_probabilities_are_normal_numbers_or_zero() -> None:
    log_p = log_probs(spread_logits())
    assert denormals(log_p.exp()) > 0
    assert denormals(probs(log_p)) == 0
    assert torch.equal(probs(log_p)[log_p < -61], torch.zeros_like(log_p[log_p < -61]))
    torch.testing.assert_close(probs(log_p), log_p.double().exp().float(), rtol=1e-5, atol=1e-25)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_normal_numbers_or_zero(name: str) -> None:
    student, teacher = spread_logits(), spread_logits().flip(0)
    DivergenceKernel(DIVERGENCES[name], PLAIN, PLAIN, with_grad=True)(student, teacher, None)
    assert denormals(student) == 0
    assert student.isfinite().all()


def test_cross_entropy_gradients_are_normal_numbers_or_zero() -> None:
    student = spread_logits()
    CrossEntropyKernel(PLAIN, with_grad=True)(student, torch.arange(8), None)
    assert denormals(student) == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_is_left_out_does_not_show(name: str) -> None:
    student, teacher = spread_logits(), spread_logits().flip(0)
    exact = DivergenceKernel(DIVERGENCES[name], PLAIN, PLAIN, with_grad=True)
    wide_student = student.double()
    wide = exact(wide_student, teacher.double(), None)
    narrow = exact(student, teacher, None)
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-6, atol=1e-7)
    assert (student.double() - wide_student).norm() <= 1e-6 * wide_student.norm()


def test_log_probs_are_the_log_softmax() -> None:
    for logits in (spread_logits(), spread_logits() * 1e4, torch.randn(3, 500, dtype=torch.float64)):
        torch.testing.assert_close(log_probs(logits), logits.log_softmax(-1))


def test_a_near_certain_label_keeps_its_digits() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 7] = 12.0
    wide, label = logits.double(), torch.tensor([7])
    kernel = CrossEntropyKernel(PLAIN, with_grad=True)
    torch.testing.assert_close(kernel(logits, label, None).double(), kernel(wide, label, None), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(logits.double(), wide, rtol=1e-6, atol=0.0)
