"""The student's initial weights: the teacher without a block of layers, or its architecture from scratch."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.data.collate import Batch
from pipeline.errors import ConfigError
from pipeline.models.lens import blocks, blocks_name


@torch.no_grad()
def angular_distances(model: PreTrainedModel, batches: Iterable[Batch], block_size: int) -> Tensor:
    """Mean angular distance between the states before and after each contiguous block of layers.

    arccos(cos(h_l, h_{l+n})) / π, averaged over response positions (eq. 5 of Gromov et al. 2024 takes each text's last
    token; responses are what a student is trained on).

    Args:
        model: the teacher.
        batches: training rows.
        block_size: n, layers in a block.

    Returns:
        [L − n + 1]; entry s belongs to the block of layers s+1 … s+n. Between 0 and 1.
    """
    starts = len(blocks(model)) - block_size + 1
    total, positions = torch.zeros(starts, dtype=torch.float64), 0
    for batch in batches:
        raw = _raw_states(model, batch)
        for start in range(starts):
            cosine = torch.nn.functional.cosine_similarity(raw[start], raw[start + block_size], dim=-1)
            total[start] += (torch.arccos(cosine.clamp(-1, 1)) / torch.pi).double().sum()
        positions += len(batch.response_positions)
    return total / max(positions, 1)


def _raw_states(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """[N, d] at response positions after 0 … L layers, none of them normed."""
    states: list[Tensor] = []

    def take(hidden: Tensor) -> None:
        states.append(hidden.flatten(0, 1)[batch.response_positions].float())

    handles = [
        blocks(model)[0].register_forward_pre_hook(
            lambda _, args, kwargs: take(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        *(
            block.register_forward_hook(lambda _m, _a, out: take(out[0] if isinstance(out, tuple) else out))
            for block in blocks(model)
        ),
    ]
    try:
        model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def prune(model: PreTrainedModel, start: int, block_size: int) -> tuple[PreTrainedModel, list[int]]:
    """A copy without layers start+1 … start+block_size.

    Returns:
        The student, and its provenance: entry l is the teacher layer whose output student layer l inherits
        (0: embeddings; the last entry is the teacher's last layer if that was kept).

    Raises:
        ConfigError: the block is not inside the model, or nothing would remain.
    """
    layers = len(blocks(model))
    if block_size < 0 or start < 0 or start + block_size > layers or block_size >= layers:
        raise ConfigError(
            f"student: cannot drop {block_size} layers from layer {start + 1} on, the teacher has {layers} layers; "
            "change student.keep_layers or student.drop_from"
        )
    kept = [layer for layer in range(layers) if not start <= layer < start + block_size]
    student = AutoModelForCausalLM.from_config(_with_layers(model.config, kept), dtype=next(model.parameters()).dtype)
    student.load_state_dict(_kept_weights(model, kept))
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval(), [0, *(layer + 1 for layer in kept)]


def from_scratch(teacher: PretrainedConfig, changes: dict[str, int], seed: int) -> PreTrainedModel:
    """A model of the teacher's architecture with other sizes and random weights.

    Args:
        teacher: the teacher's configuration.
        changes: configuration values in the architecture-neutral names num_hidden_layers, hidden_size,
            intermediate_size, num_attention_heads, num_key_value_heads.
        seed: seed of the random weights.
    """
    config = copy.deepcopy(teacher)
    attribute_map = getattr(config, "attribute_map", {})
    for name, value in changes.items():
        key = "n_inner" if name == "intermediate_size" and hasattr(config, "n_inner") else attribute_map.get(name, name)
        if not hasattr(config, key):
            raise ConfigError(f"student: {teacher.model_type} has no {name} to change; leave it null")
        setattr(config, key, value)
    if "hidden_size" in changes or "num_attention_heads" in changes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


def _with_layers(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    pruned = copy.deepcopy(config)
    pruned.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        pruned.layer_types = [config.layer_types[layer] for layer in kept]
    return pruned


def _kept_weights(model: PreTrainedModel, kept: list[int]) -> dict[str, Tensor]:
    pattern = re.compile(rf"^{re.escape(blocks_name(model))}\.(\d+)\.")
    renumbered = {old: new for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        match = pattern.match(name)
        if match is None:
            weights[name] = tensor
        elif int(match[1]) in renumbered:
            weights[pattern.sub(f"{blocks_name(model)}.{renumbered[int(match[1])]}.", name)] = tensor
    return weights
