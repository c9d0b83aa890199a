"""A key-value cache with room for the whole response: a step writes one column instead of copying everything before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicLayer, LinearAttentionCacheLayerMixin

from pipeline.errors import ModelError

AnyLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer
"""What the layers of a transformers cache may be."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [R, heads, T, head size] views at the start of buffers that are `room` tokens longer.

    Args:
        keys: [P, heads, T, head size] of the prompts; not changed.
        values: likewise.
        copies: rows per prompt, side by side: R = P × copies.
        room: tokens that will follow at most.
    """

    def __init__(self, keys: Tensor, values: Tensor, copies: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._key_buffer, self._value_buffer = _widen(keys, copies, room), _widen(values, copies, room)
        self._show(keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *_args: object, **_options: object) -> tuple[Tensor, Tensor]:
        """Append [R, heads, t, head size] keys and values; returns all of them.

        Raises:
            ValueError: no room is left.
        """
        length, room = self.get_seq_length(), self._key_buffer.shape[-2]
        end = length + key_states.shape[-2]
        if end > room:
            # A single column would otherwise broadcast into an empty slice and be lost.
            raise ValueError(f"the cache has room for {room} tokens, {end} are needed")
        self._key_buffer[:, :, length:end] = key_states
        self._value_buffer[:, :, length:end] = value_states
        return self._show(end)

    def keep(self, indices: Sequence[int]) -> None:
        """Reduce the rows to `indices`, of which each is at least its place in the list."""
        length = self.get_seq_length()
        for buffer in (self._key_buffer, self._value_buffer):
            for place, index in enumerate(indices):
                if place != index:
                    buffer[place, :, :length] = buffer[index, :, :length]
        self._key_buffer = self._key_buffer[: len(indices)]
        self._value_buffer = self._value_buffer[: len(indices)]
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]
        return self.keys, self.values


def with_room(layers: list[AnyLayer], copies: int, room: int) -> Cache:
    """A cache of `copies` rows per prompt with room for `room` more tokens.

    Args:
        layers: the prompts' layers. Emptied as they are copied, so that both never lie in memory as a whole.
        copies: rows per prompt, side by side.
        room: tokens that will follow at most.

    Raises:
        ModelError: a layer that does not hold one state per row and token, such as linear attention.
    """
    roomy: list[AnyLayer] = []
    while layers:
        roomy.append(_with_room(layers.pop(0), copies, room))
    return Cache(layers=roomy)


def keep_rows(cache: Cache, kept: Sequence[int]) -> list[int]:
    """Take ended rows out of a cache, moving as few of the others as possible.

    Args:
        cache: from `with_room`.
        kept: ascending rows that go on.

    Returns:
        The old row of each new one.
    """
    count = len(kept)
    staying = [index for index in kept if index < count]
    moving = iter([index for index in kept if index >= count])
    holes = set(range(count)) - set(staying)
    order = [next(moving) if place in holes else place for place in range(count)]
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(order)
        else:
            _rows_of(layer).batch_select_indices(torch.tensor(order))
    return order


def _with_room(layer: AnyLayer, copies: int, room: int) -> AnyLayer:
    # Only plain attention grows without end; sliding windows keep transformers' own layers.
    if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
        return RoomyLayer(layer.keys, layer.values, copies, room)
    own = copy.deepcopy(_rows_of(layer))
    own.batch_repeat_interleave(copies)
    return own


def _rows_of(layer: AnyLayer) -> DynamicLayer:
    if not isinstance(layer, DynamicLayer):
        raise ModelError(f"decoding in batches needs attention layers, the model has {type(layer).__name__}; use another model")
    return layer


def _widen(states: Tensor, copies: int, room: int) -> Tensor:
    prompts, heads, length, size = states.shape
    buffer = states.new_empty(prompts, copies, heads, length + room, size)
    buffer[:, :, :, :length] = states[:, None]
    return buffer.flatten(0, 1)
