"""The teacher run beside the student: its body's forward pass, without logits, keeping only the layers asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pipeline.data.collate import Batch
from pipeline.models.lens import blocks


@dataclass(frozen=True)
class OnlineSignal:
    """States of one batch at every position, straight from the model.

    Attributes:
        grids: layer → [B·T, d] in the model's dtype.
    """

    grids: Mapping[int, Tensor]

    def states(self, layer: int, positions: Tensor) -> Tensor:
        """States [N, d] after `layer` at flat positions [N] of the batch.

        Raises:
            ValueError: the layer was not asked for when the signal was made.
        """
        if layer not in self.grids:
            raise ValueError(f"teacher layer {layer} is not in this signal; it was made for {sorted(self.grids)}")
        return self.grids[layer].index_select(0, positions)


class OnlineTeacher:
    """A TeacherSource that runs the teacher for each batch.

    Args:
        model: the causal language model; put into evaluation mode, so that no dropout disturbs its states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: PreTrainedModel = model.eval()

    @property
    def num_layers(self) -> int:
        """L_T, the number of transformer layers."""
        return len(blocks(self._model))

    @property
    def reads_ahead(self) -> bool:
        """False: it computes, on the cores or the device of the step itself."""
        return False

    def signal(self, batch: Batch, layers: Sequence[int]) -> OnlineSignal:
        """Run the teacher's body on the batch, which must be on its device.

        Raises:
            ValueError: a layer is outside 0 … L_T.
        """
        return OnlineSignal(layer_states(self._model, batch, layers))


@torch.no_grad()
def layer_states(
    model: PreTrainedModel, batch: Batch, layers: Sequence[int], positions: Tensor | None = None
) -> dict[int, Tensor]:
    """States after the given layers, without logits and without keeping any other layer.

    Index 0 is the blocks' input, l < L the raw output of block l, L the final state after the final norm; the same as
    `hidden_states[l]` of transformers, whose last entry is normed and whose others are not (hazard 2).

    Args:
        model: a causal language model or its body, in evaluation mode.
        batch: padded on the right, so that default position ids are right.
        layers: layer indices.
        positions: [N] flat positions to keep; None keeps the whole grid.

    Returns:
        layer → [N, d], or [B·T, d] without `positions`. Plain tensors without gradient: inference-mode tensors could not
        be saved for the student's backward pass.

    Raises:
        ValueError: a layer is outside 0 … L.
    """
    modules = blocks(model)
    last = len(modules)
    outside = sorted(layer for layer in set(layers) if not 0 <= layer <= last)
    if outside:
        raise ValueError(f"teacher layers {outside} do not exist; the teacher has 0 (embeddings) to {last}")
    kept: dict[int, Tensor] = {}

    def keep(layer: int, grid: Tensor) -> None:
        flat = grid.flatten(0, 1)
        kept[layer] = flat if positions is None else flat.index_select(0, positions)

    handles = [_hook(modules, layer, keep) for layer in set(layers) if layer != last]
    try:
        output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if last in layers:
        keep(last, output.last_hidden_state)
    return kept


def _hook(modules: nn.ModuleList, layer: int, keep: Callable[[int, Tensor], None]) -> RemovableHandle:
    if layer == 0:

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(0, args[0] if args else kwargs["hidden_states"])

        return modules[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(layer, output[0] if isinstance(output, tuple) else output)

    return modules[layer - 1].register_forward_hook(after)
