from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from pipeline.errors import ModelError
from pipeline.evaluation.kv_cache import RoomyLayer, keep_rows, with_room


def _filled(layer: DynamicLayer, prompts: int, length: int) -> DynamicLayer:
    layer.update(torch.randn(prompts, 2, length, 4), torch.randn(prompts, 2, length, 4))
    return layer


def test_roomy_layer_follows_the_plain_one_through_steps_and_ended_rows() -> None:
    layers = [_filled(DynamicLayer(), 3, 5), _filled(DynamicLayer(), 3, 5)]
    plain = [DynamicLayer(), DynamicLayer()]
    for copied, layer in zip(plain, layers, strict=True):
        copied.update(layer.keys.repeat_interleave(4, 0), layer.values.repeat_interleave(4, 0))
    cache = with_room(layers, copies=4, room=6)
    assert layers == []
    rows = 12
    for kept in (list(range(12)), [0, 1, 3, 4, 6, 7, 8, 11], [1, 7], [0, 1], [1], [0]):
        order = keep_rows(cache, kept)
        assert sorted(order) == kept
        assert len(order) <= rows
        rows = len(order)
        keys, values = torch.randn(rows, 2, 1, 4), torch.randn(rows, 2, 1, 4)
        for roomy, layer in zip(cache.layers, plain, strict=True):
            layer.batch_select_indices(torch.tensor(order))
            expected = layer.update(keys, values)
            found = roomy.update(keys, values)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            assert roomy.get_seq_length() == layer.get_seq_length()


def test_a_step_writes_in_place() -> None:
    cache = with_room([_filled(DynamicLayer(), 2, 5)], copies=1, room=2)
    layer = cache.layers[0]
    assert isinstance(layer, RoomyLayer)
    before = layer.keys.data_ptr()
    for _ in range(2):
        layer.update(torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4))
    assert layer.keys.data_ptr() == before
    with pytest.raises(ValueError, match="room for 7 tokens, 8 are needed"):
        layer.update(torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4))


def test_only_rows_from_the_end_move_into_the_holes() -> None:
    cache = with_room([_filled(DynamicLayer(), 6, 3)], copies=1, room=1)
    assert keep_rows(cache, [0, 2, 3, 5]) == [0, 5, 2, 3]


def test_the_prompts_layers_can_serve_again() -> None:
    layer = _filled(DynamicLayer(), 2, 5)
    before = layer.keys.clone()
    cache = with_room([layer], copies=2, room=1)
    cache.layers[0].update(torch.randn(4, 2, 1, 4), torch.randn(4, 2, 1, 4))
    keep_rows(cache, [3])
    assert torch.equal(layer.keys, before)


def test_other_kinds_of_layers_keep_their_own_behaviour() -> None:
    layer = _filled(DynamicSlidingWindowLayer(sliding_window=4), 2, 6)
    cache = with_room([layer], copies=2, room=3)
    own = cache.layers[0]
    assert type(own) is DynamicSlidingWindowLayer
    assert torch.equal(own.keys, layer.keys.repeat_interleave(2, 0))
    order = keep_rows(cache, [1, 3])
    assert torch.equal(own.keys, layer.keys.repeat_interleave(2, 0)[order])
    assert layer.keys.shape[0] == 2


def test_layers_without_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="needs attention layers, the model has LinearAttentionLayer"):
        with_room([LinearAttentionLayer()], copies=2, room=3)
