"""The whole objective against numbers of the published code (goldens), in value and in every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.losses.head import Head
from pipeline.losses.objective import LensTerm, Objective, Side, compute

TASKS = {"rkl": "reverse_kl", "fkl": "forward_kl", "jsd": "jensen_shannon"}
FINAL = 3


def side(hidden: dict[int, Tensor], weight: Tensor) -> Side:
    return Side(lambda layer, at: hidden[layer].flatten(0, 1)[at], Head(weight), lambda states: states, FINAL)


def run(golden: dict[str, Tensor], task: str, layout: str) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    students = {
        i: golden[f"student_hidden.{i}"].clone().requires_grad_() for i in range(FINAL + 1) if f"student_hidden.{i}" in golden
    }
    teachers = {i: golden[f"teacher_hidden.{i}"] for i in students}
    head = golden["student_head"].clone().requires_grad_()
    pairs = tuple((i, i) for i in sorted(students) if i != FINAL)
    objective = Objective(1.0, task, lens=LensTerm(1.0, "jensen_shannon", pairs, False, layout))
    labels = golden["label"]
    terms = compute(
        objective, side(students, head), side(teachers, golden["teacher_head"]), labels, denominator=int((labels != -100).sum())
    )
    terms.total.backward()
    return terms.total.detach(), students, head


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("batch", "layout"), [(1, "aligned"), (1, "official"), (3, "official")])
def test_the_published_objective(shared: Path, name: str, batch: int, layout: str) -> None:
    golden = load_file(shared / "golden" / f"objective_{name}_batch{batch}.safetensors")
    value, students, head = run(golden, TASKS[name], layout)
    torch.testing.assert_close(value, golden["value"][0], rtol=1e-5, atol=1e-6)
    for layer, state in students.items():
        torch.testing.assert_close(state.grad, golden[f"grad_student_hidden.{layer}"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.grad, golden["grad_student_head"], rtol=1e-4, atol=1e-6)


def test_at_batch_three_the_aligned_masks_differ_from_the_published_ones(shared: Path) -> None:
    golden = load_file(shared / "golden" / "objective_rkl_batch3.safetensors")
    value, _, _ = run(golden, "reverse_kl", "aligned")
    assert abs(float(value - golden["value"][0])) > 1e-3
