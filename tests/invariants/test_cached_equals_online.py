"""A float32 cache changes nothing: states, losses and gradients are those of the teacher run online."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.objective import FeatureTerm, LensTerm, Objective, new_projection
from pipeline.models.lens import logit_lens
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture
from pipeline.teacher.online import OnlineTeacher
from pipeline.teacher.signal import TeacherSource
from pipeline.training.step import Student, Teacher, micro_batch_loss

LAYERS = (0, 2, 4, 6)
PAIRS = ((1, 2), (2, 4))
ROWS = [EncodedExample(f"e{i}", tuple(range(3 + i, 9 + 4 * i)), 2 + i % 3) for i in range(8)]
ORDERS = [[0, 1, 2, 3], [7, 2, 5], [6]]
FAMILIES = {"llama": tiny.llama, "gpt2": tiny.gpt2}
OBJECTIVES = {
    "kd": Objective(0.5, "forward_kl"),
    "mse": Objective(1.0, "reverse_kl", features=FeatureTerm(1.0, PAIRS, "response", "student")),
    "distilllens": Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, False, "aligned")),
    "normed lens": Objective(1.0, "adaptive_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, True, "aligned")),
}


Sources = tuple[PreTrainedModel, TeacherSource, TeacherSource]


@pytest.fixture(params=FAMILIES)
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> Sources:
    return both(FAMILIES[request.param](layers=6, seed=2), tmp_path)


def both(model: PreTrainedModel, folder: Path) -> Sources:
    """The model, and its states as it computes them and as they are read."""
    key = CacheKey("t", "k", "alpaca", "d", LAYERS, "float32", 64)
    device = torch.device("cpu")
    # Batches and shards unlike those of training: rows must not remember their neighbours.
    capture(model, ROWS, LAYERS, folder, key, shard_bytes=4096, batch_size=3, pad_token_id=0, device=device)
    return model, OnlineTeacher(model), CachedTeacher(folder, key, num_layers=6, device=device)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_equal_in_any_batch(family: str, tmp_path: Path) -> None:
    """Computed in float64: what another batch's matrix shapes do to float32 differs from processor to processor."""
    _, online, cached = both(FAMILIES[family](layers=6, seed=2).double(), tmp_path)
    assert online.num_layers == cached.num_layers == 6
    for order in ORDERS:
        batch = collate([ROWS[i] for i in order], 0)
        expected, found = online.signal(batch, LAYERS), cached.signal(batch, LAYERS)
        for layer in LAYERS:
            exact = expected.states(layer, batch.response_positions)
            error = (found.states(layer, batch.response_positions) - exact).norm(dim=1)
            assert (error <= 2**-24 * exact.norm(dim=1)).all()  # they are kept in float32


def test_states_of_the_captured_batch_are_equal_to_the_bit(
    sources: Sources,
) -> None:
    _, online, cached = sources
    batch = collate([ROWS[i] for i in (7, 6, 5)], 0)
    expected, found = online.signal(batch, LAYERS), cached.signal(batch, LAYERS)
    for layer in LAYERS:
        assert torch.equal(found.states(layer, batch.response_positions), expected.states(layer, batch.response_positions))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_equal(sources: Sources, name: str) -> None:
    model, online, cached = sources
    objective = OBJECTIVES[name]
    batch = collate([ROWS[i] for i in (7, 0, 3, 4)], 0)

    def gradients(source: TeacherSource) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        student_model = tiny.llama(layers=3, seed=1)
        torch.manual_seed(0)
        projection = new_projection(objective.features, 32, 32) if objective.features else None
        student = Student(student_model, logit_lens(student_model), projection)
        terms = micro_batch_loss(
            student, Teacher(source, logit_lens(model)), objective, batch, denominator=sum(batch.response_counts), autocast=None
        )
        terms.total.backward()
        grads = {name: p.grad for module in student.modules for name, p in module.named_parameters() if p.grad is not None}
        return {"total": terms.total.detach(), **terms.parts}, grads

    expected_terms, expected = gradients(online)
    found_terms, found = gradients(cached)
    torch.testing.assert_close(found_terms, expected_terms, rtol=1e-6, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def refuse_forward() -> Callable[[PreTrainedModel], None]:
    def refuse(model: PreTrainedModel) -> None:
        def fail(*_: object) -> None:
            raise AssertionError("the teacher's body ran")

        model.base_model.register_forward_pre_hook(fail)

    return refuse


def test_the_body_is_not_run(sources: Sources, refuse_forward: Callable[[PreTrainedModel], None]) -> None:
    model, online, cached = sources
    refuse_forward(model)
    batch = collate(ROWS[:2], 0)
    cached.signal(batch, LAYERS).states(2, batch.response_positions)
    with pytest.raises(AssertionError, match="body ran"):
        online.signal(batch, LAYERS)
