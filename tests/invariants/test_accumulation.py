"""Gradient accumulation: how a batch is divided changes nothing (plain SGD, so that nothing hides a scale)."""

from __future__ import annotations

import pytest
import tiny
import torch

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.objective import FeatureTerm, LensTerm, Objective, new_projection
from pipeline.models.lens import logit_lens
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.step import Student, Teacher, optimizer_step

PAIRS = ((1, 2), (2, 4))
OBJECTIVES = {
    "sft": Objective(0.0),
    "mixed": Objective(0.5, "jensen_shannon"),
    "mse": Objective(1.0, "forward_kl", features=FeatureTerm(1.0, PAIRS, "response", "student")),
    "distilllens": Objective(0.7, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, True, "aligned")),
}
ROWS = [EncodedExample(f"e{i}", tuple(range(3 + i, 9 + 4 * i)), 2 + i % 3) for i in range(8)]


def step(objective: Objective, sizes: list[int]) -> tuple[dict[str, float], torch.Tensor]:
    model, other = tiny.llama(layers=3, seed=1), tiny.llama(layers=6, seed=2)
    projection = new_projection(objective.features, 32, 32) if objective.features else None
    student = Student(model, logit_lens(model), projection)
    parts, start = [], 0
    for size in sizes:
        parts.append(collate(ROWS[start : start + size], 0))
        start += size
    optimizer = torch.optim.SGD([p for m in student.modules for p in m.parameters()], lr=0.1)
    teacher = Teacher(OnlineTeacher(other), logit_lens(other))
    losses = optimizer_step(student, teacher, objective, parts, optimizer, max_grad_norm=None, autocast=None)
    return losses, torch.cat([p.detach().flatten() for m in student.modules for p in m.parameters()])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [2, 3, 3]])
def test_two_by_four_is_one_by_eight(name: str, sizes: list[int]) -> None:
    whole, expected = step(OBJECTIVES[name], [8])
    divided, found = step(OBJECTIVES[name], sizes)
    assert divided == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
