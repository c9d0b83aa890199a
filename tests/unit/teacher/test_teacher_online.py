from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.teacher.online import OnlineTeacher, layer_states

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}


def unusual_norm(model: PreTrainedModel) -> torch.nn.Module:
    """A final norm that visibly changes its input."""
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm


@pytest.fixture
def batch(rows: list[EncodedExample]) -> Batch:
    return collate(rows[:4], 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_follow_the_convention_of_transformers(family: str, batch: Batch) -> None:
    model = FAMILIES[family]()
    unusual_norm(model)
    everything = torch.arange(batch.input_ids.numel())
    with torch.no_grad():
        expected = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
    signal = OnlineTeacher(model).signal(batch, range(5))
    assert OnlineTeacher(model).num_layers == 4
    for layer in range(5):
        torch.testing.assert_close(signal.states(layer, everything), expected[layer].flatten(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_layer_is_normed(family: str, batch: Batch) -> None:
    model = FAMILIES[family]()
    norm = unusual_norm(model)
    block_outputs: list[torch.Tensor] = []
    stack = model.transformer.h if family == "gpt2" else model.model.layers
    for block in stack:
        block.register_forward_hook(lambda _, __, out: block_outputs.append(out[0] if isinstance(out, tuple) else out))
    states = layer_states(model, batch, [3, 4])
    torch.testing.assert_close(states[3], block_outputs[2].flatten(0, 1), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(states[4], norm(block_outputs[3]).flatten(0, 1), rtol=0, atol=0)
    assert not torch.allclose(states[4], block_outputs[3].flatten(0, 1))


def test_states_at_positions_are_rows_of_the_grid(teacher: PreTrainedModel, batch: Batch) -> None:
    grid = layer_states(teacher, batch, [0, 1, 4])
    picked = layer_states(teacher, batch, [0, 1, 4], batch.response_positions)
    signal = OnlineTeacher(teacher).signal(batch, [0, 1, 4])
    for layer in (0, 1, 4):
        expected = grid[layer][batch.response_positions]
        assert torch.equal(picked[layer], expected)
        assert torch.equal(signal.states(layer, batch.response_positions), expected)


def test_no_logits_are_computed(teacher: PreTrainedModel, batch: Batch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the head ran")

    teacher.lm_head.register_forward_pre_hook(refuse)
    OnlineTeacher(teacher).signal(batch, [4])


def test_states_can_be_saved_for_a_backward_pass(teacher: PreTrainedModel, batch: Batch) -> None:
    states = OnlineTeacher(teacher).signal(batch, [2]).states(2, batch.response_positions)
    assert not states.requires_grad
    weight = torch.ones(states.shape[1], requires_grad=True)
    (states * weight).sum().backward()
    torch.testing.assert_close(weight.grad, states.sum(dim=0))


def test_dropout_is_off(batch: Batch) -> None:
    model = tiny.gpt2(dropout=0.5).train()
    teacher = OnlineTeacher(model)
    first, second = (teacher.signal(batch, [4]).states(4, batch.response_positions) for _ in range(2))
    assert torch.equal(first, second)


def test_other_layers_are_not_kept_and_hooks_go_away(teacher: PreTrainedModel, batch: Batch) -> None:
    signal = OnlineTeacher(teacher).signal(batch, [1, 4])
    assert sorted(signal.grids) == [1, 4]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in teacher.model.layers)
    with pytest.raises(ValueError, match=r"layer 2 is not in this signal; it was made for \[1, 4\]"):
        signal.states(2, batch.response_positions)


def test_hooks_go_away_after_a_failure(teacher: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(teacher.model.layers[2].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        layer_states(teacher, batch, [0, 1, 2])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in teacher.model.layers)


@pytest.mark.parametrize("layers", [[5], [-1, 2]])
def test_a_layer_that_does_not_exist_is_refused(teacher: PreTrainedModel, batch: Batch, layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not exist; the teacher has 0 \(embeddings\) to 4"):
        OnlineTeacher(teacher).signal(batch, layers)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_padding_does_not_change_a_row(make: Callable[[], PreTrainedModel], rows: list[EncodedExample]) -> None:
    model = make()
    alone, padded = collate(rows[:1], 0), collate([rows[0], max(rows, key=lambda row: len(row.input_ids))], 0)
    expected = layer_states(model, alone, [2, 4], alone.response_positions)
    found = layer_states(model, padded, [2, 4], padded.response_positions[: alone.response_counts[0]])
    for layer in (2, 4):
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-5, atol=1e-5)
