"""Low-rank adapters (LoRA) by the peft library, injected in place: the model stays what the rest of the pipeline knows."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ConfigError, ModelError
from pipeline.models.lens import blocks, blocks_name

ALL_LINEAR = "all-linear"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INSTALL = 'pip install "peft>=0.21"'
_NAME = "default"
# A plain PeftModel holds the model under this name, so that is how peft's files call its parameters.
_PREFIX = "base_model.model."


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | Literal["all-linear"],
    seed: int,
) -> None:
    """Add an adapter to linear layers of the blocks, in place, and freeze everything else.

    W becomes W + (alpha / rank) · B A with A [rank, in] random and B [out, rank] zero, so the model's outputs do not change
    yet. Embeddings, final norm and output head are never adapted: the logit lens keeps its weights, frozen and shared.
    `model.save_pretrained` writes peft's format from here on, until `merge`.

    Args:
        model: gets the adapter; its own parameters no longer require gradients.
        rank: r.
        alpha: numerator of the adapter's scale.
        dropout: on the adapter's input, during training.
        targets: names of linear layers inside the blocks, the last part (`q_proj`) or several (`mlp.c_proj`); or
            "all-linear" for all of them.
        seed: of A; the global random state is left alone.

    Raises:
        ConfigError: a target that no block has, or none given.
        ModelError: peft is not installed, or the architecture's blocks are not found.
        ValueError: the model has an adapter already.

    Source: Hu et al. (2022), section 4.1.
    """
    _check_bare(model)
    peft, names = _peft(), _target_names(model, targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    _inject(model, config, seed)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter in peft's format: adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: the model has no adapter.
    """
    config, state = _config(model), _peft().get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    described = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    described["inference_mode"] = True
    folder.mkdir(parents=True, exist_ok=True)
    weights = {_PREFIX + name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add a saved adapter to the model that it was trained on, in place; it can be trained further, as after `add_lora`.

    Raises:
        ModelError: peft is not installed, the folder holds no LoRA adapter in safetensors, or it belongs to another model.
        ValueError: the model has an adapter already.
    """
    config, weights = _read_config(folder), _read_weights(folder)
    _check_bare(model)
    try:
        _inject(model, config, seed=0)
        found = _peft().set_peft_model_state_dict(model, weights, adapter_name=_NAME)
    except (ValueError, RuntimeError) as error:
        raise _unfit(folder, str(error)) from None
    differing = [*found.unexpected_keys, *(key for key in found.missing_keys if ".lora_" in key)]
    if differing:
        raise _unfit(folder, f"{len(differing)} tensors are missing or unknown, the first is {differing[0]}")


def merge(model: PreTrainedModel) -> None:
    """Add the adapter to the weights that it adapts, in place, and take it out: a plain model with equal outputs.

    Its parameters require gradients again, as those of a model just loaded.

    Raises:
        ModelError: the adapter holds weights that are not finite.
        ValueError: the model has no adapter.
    """
    _config(model)
    layer_type = _peft().tuners.lora.LoraLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, layer_type):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                raise ModelError(f"the adapter of {name} cannot be merged ({error}); use an earlier checkpoint") from None
            model.set_submodule(name, module.get_base_layer())
    model.delete_adapter(_NAME)
    model.requires_grad_(True)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (folder / _CONFIG).is_file()


def trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name: the adapter's where the model has one, else all that are not frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _peft() -> Any:
    # Not at the top: it takes more than a second, and only adapters need it.
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(f"LoRA needs the peft library, which cannot be imported ({error}); install it: {_INSTALL}") from None


def _check_bare(model: PreTrainedModel) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError("the model has an adapter already; merge it first")


def _config(model: PreTrainedModel) -> Any:
    """The adapter's `peft.LoraConfig`."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError("the model has no adapter; call add_lora or load_adapter first")
    return configs[_NAME]


def _inject(model: PreTrainedModel, config: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # transformers' own entry: it also makes save_pretrained write the adapter instead of a checkpoint with odd names.
        model.add_adapter(config, _NAME)
    # The adapter's modules arrive in training mode, whatever the model's.
    model.train(model.training)


def _target_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the targeted layers, so that peft's matching by suffix cannot reach outside the blocks."""
    prefix = blocks_name(model)
    layers = [name for name, module in blocks(model).named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if targets == ALL_LINEAR:
        return [f"{prefix}.{name}" for name in layers]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    kind = model.config.model_type
    problems = [
        f"{target!r} is no linear layer in the blocks of this {kind} model"
        for target in wanted
        if not any(_matches(name, target) for name in layers)
    ]
    if not wanted:
        problems = ["the list is empty"]
    if problems:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        fix = f"there are {there}; or use {ALL_LINEAR!r} for all of them"
        raise ConfigError([f"train.lora.target_modules: {problem}; {fix}" for problem in problems])
    return [f"{prefix}.{name}" for name in layers if any(_matches(name, target) for target in wanted)]


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _unfit(folder: Path, what: str) -> ModelError:
    return ModelError(f"{folder}: this adapter does not fit the model ({what}); load the model that it was trained on")


def _read_config(folder: Path) -> Any:
    if not is_adapter(folder):
        raise ModelError(f"{folder} has no {_CONFIG}; give a folder with a LoRA adapter in peft's format")
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/{_CONFIG}: not an adapter's configuration ({error}); give another adapter") from None
    if type(config) is not peft.LoraConfig:
        raise ModelError(f"{folder}/{_CONFIG}: peft_type is {config.peft_type}; only LORA adapters are supported; give one")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder}/{_WEIGHTS}: cannot be read ({error}); give an adapter in safetensors, pickled ones are refused"
        ) from None
    return weights
