"""Divergences against the official code's numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.losses import divergences
from pipeline.losses.divergences import DIVERGENCES, Divergence, jensen_shannon_terms
from pipeline.losses.fused import vocab_divergence
from pipeline.losses.head import Head

# The official Jensen-Shannon adds 1e-8 inside its logarithm.
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Divergence, float]] = {
    "forward_kl": (divergences.forward_kl, DIVERGENCES["forward_kl"], 1e-6),
    "reverse_kl": (divergences.reverse_kl, DIVERGENCES["reverse_kl"], 1e-6),
    "adaptive_kl": (divergences.adaptive_kl, DIVERGENCES["adaptive_kl"], 1e-6),
    "jensen_shannon": (divergences.jensen_shannon, DIVERGENCES["jensen_shannon"], 1e-5),
    "jensen_shannon_beta_0.1": (partial(divergences.jensen_shannon, beta=0.1), jensen_shannon_terms(0.1), 1e-5),
}


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden" / "divergences.safetensors")


def test_every_golden_divergence_is_covered(golden: dict[str, Tensor]) -> None:
    assert {key.removesuffix("/value") for key in golden if key.endswith("/value")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_official_ones(golden: dict[str, Tensor], name: str) -> None:
    function, _, tolerance = CASES[name]
    student = golden["student_logits"].clone().requires_grad_()
    nats = function(golden["teacher_logits"], student)
    mask = golden["mask"]
    mean = (nats * mask).sum() / mask.sum()
    mean.backward()
    torch.testing.assert_close(mean.reshape(1), golden[f"{name}/value"], rtol=tolerance, atol=0.0)
    expected = golden[f"{name}/grad_student_logits"]
    torch.testing.assert_close(student.grad, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_fused_value_and_gradient_equal_the_official_ones(golden: dict[str, Tensor], name: str) -> None:
    _, divergence, tolerance = CASES[name]
    rows = golden["mask"].bool()
    student, teacher = golden["student_logits"][rows].requires_grad_(), golden["teacher_logits"][rows]
    identity = Head(torch.eye(student.shape[1]))
    mean = vocab_divergence(student, identity, teacher, identity, divergence=divergence, chunk_tokens=4)
    mean.backward()
    torch.testing.assert_close(mean.reshape(1), golden[f"{name}/value"], rtol=tolerance, atol=0.0)
    expected = golden[f"{name}/grad_student_logits"][rows]
    torch.testing.assert_close(student.grad, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))
