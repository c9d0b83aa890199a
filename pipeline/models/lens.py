"""Logit lens: a model's own output head on its own states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import ModelError
from pipeline.losses.head import Head
from pipeline.models.load import load_config

_NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_BLOCK_NAMES = ("layers", "h")


@dataclass(frozen=True)
class LogitLens:
    """Projects states to vocabulary logits.

    Attributes:
        head: the output head.
        norm: the final norm, applied to intermediate states only where asked for (hazard 2).
        num_layers: L; states with index L are already normed.
    """

    head: Head
    norm: Callable[[Tensor], Tensor]
    num_layers: int

    def prepare(self, states: Tensor, layer: int, final_norm: bool) -> Tensor:
        """States as the head gets them: normed if asked for, and never twice."""
        return self.norm(states) if final_norm and layer != self.num_layers else states

    def logits(self, states: Tensor, layer: int, final_norm: bool = False) -> Tensor:
        """Logits [..., V] of the states [..., d] after `layer`."""
        return self.head.logits(self.prepare(states, layer, final_norm))


def logit_lens(model: PreTrainedModel, vocab_size: int | None = None) -> LogitLens:
    """The lens of a model; differentiable in its head and norm.

    Raises:
        ModelError: the model's structure is not understood, or its logits are not its head's output (checked on two tokens).
    """
    lens = LogitLens(head=_head(model, vocab_size), norm=final_norm(model), num_layers=len(blocks(model)))
    _verify(model, lens)
    return lens


def load_lens(folder: Path, device: torch.device) -> LogitLens:
    """The lens of a saved model without its body: only the head's and the final norm's weights are read.

    Raises:
        ModelError: the structure is not understood, or the weights are not in the folder's safetensors.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head, norm = model.get_output_embeddings(), final_norm(model)
    inputs = model.get_input_embeddings()
    tied = {"weight": inputs} if config.tie_word_embeddings else {}
    for module in (head, norm):
        weights = {
            name: _read_weight(folder, _full_name(model, tied.get(name, module) if module is head else module, name))
            for name, _ in module.named_parameters(recurse=False)
        }
        module.to_empty(device=device)
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight.to(device, torch.float32), requires_grad=False))
    return LogitLens(head=_head(model, None), norm=norm, num_layers=len(blocks(model)))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks.

    Raises:
        ModelError: the architecture keeps them under an unknown name.
    """
    return _child(model, _BLOCK_NAMES, "list of transformer blocks")  # type: ignore[return-value]


def blocks_name(model: PreTrainedModel) -> str:
    """Prefix of the blocks' parameters in the state dict, for example `model.layers`."""
    modules = blocks(model)
    return next(str(name) for name, module in model.named_modules() if module is modules)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head.

    Raises:
        ModelError: the architecture keeps it under an unknown name.
    """
    return _child(model, _NORM_NAMES, "final norm")


def check_vocabulary_sizes(teacher: int, student: int, tokenizer: int) -> int:
    """The number of vocabulary entries that both heads share (hazard 7).

    Heads of different padded length are compared on the common prefix, as long as it covers the tokenizer.

    Raises:
        ModelError: a head is smaller than the tokenizer, so the two do not speak the same vocabulary.
    """
    common = min(teacher, student)
    if common < tokenizer:
        raise ModelError(
            f"teacher and student vocabularies differ: the heads have {teacher} and {student} entries, the tokenizer has "
            f"{tokenizer}; distillation on logits needs one tokenizer for both, choose a student of the teacher's family"
        )
    return common


def check_same_tokens(teacher: Mapping[str, int], student: Mapping[str, int]) -> None:
    """Make sure that every token that both tokenizers have is the same id in both (hazard 7).

    Args:
        teacher: token → id.
        student: token → id.

    Raises:
        ModelError: they are different tokenizers, whatever their sizes.
    """
    differing = [token for token, own in student.items() if teacher.get(token, own) != own]
    if differing:
        token = min(differing, key=student.__getitem__)
        raise ModelError(
            f"teacher and student have different tokenizers: {token!r} is token {teacher[token]} of the teacher's and token "
            f"{student[token]} of the student's; choose two models of one family"
        )


def _head(model: PreTrainedModel, vocab_size: int | None) -> Head:
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"{model.config.model_type}: its output head is {type(module).__name__}, only linear heads are supported; "
            "use another model"
        )
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scaling = getattr(config, "logits_scaling", None)
    if scaling:
        scale /= float(scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, module.bias, scale, float(softcap) if softcap else None, vocab_size)


@torch.no_grad()
def _verify(model: PreTrainedModel, lens: LogitLens) -> None:
    ids = torch.tensor([[1, 2]], device=lens.head.weight.device)
    training = model.training
    model.eval()
    try:
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    finally:
        model.train(training)
    width = output.hidden_states[1].shape[-1]
    if width != lens.head.weight.shape[1]:
        raise ModelError(
            f"{model.config.model_type}: its blocks are {width} wide and its head takes {lens.head.weight.shape[1]}; "
            "a projection between the two is not supported, use another model"
        )
    expected = output.logits[..., : lens.head.size].float()
    difference = lens.head.logits(output.hidden_states[-1]).float() - expected
    # Half-precision models are this far from themselves; anything that the lens leaves out is farther.
    if difference.abs().max() > 1e-2 * expected.abs().max():
        raise ModelError(
            f"{model.config.model_type}: the model's logits are not its head applied to its final states "
            "(an unknown scaling or projection), so its logit lens would be wrong; use another model"
        )


def _child(model: PreTrainedModel, names: tuple[str, ...], what: str) -> nn.Module:
    base = model.base_model
    for holder in (base, getattr(base, "decoder", None)):
        for name in names:
            child = getattr(holder, name, None)
            if isinstance(child, nn.Module):
                return child
    raise ModelError(
        f"{model.config.model_type}: no {what} found (looked for {', '.join(names)}); this architecture is not supported, "
        "use another"
    )


def _saved_names(name: str) -> tuple[str, ...]:
    """Names under which a tensor may be saved: some lack the base model's prefix, GPT-NeoX renames its head."""
    renamed = (name.replace("lm_head.", "embed_out.", 1),) if name.startswith("lm_head.") else ()
    return (name, name.partition(".")[2], *renamed)


def _full_name(model: PreTrainedModel, module: nn.Module, parameter: str) -> str:
    return next(f"{name}.{parameter}" for name, candidate in model.named_modules() if candidate is module)


def _read_weight(folder: Path, name: str) -> Tensor:
    """One tensor of a safetensors folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            keys = set(weights.keys())
            for candidate in _saved_names(name):
                if candidate in keys:
                    tensor: Tensor = weights.get_tensor(candidate)
                    return tensor
    raise ModelError(f"{folder}: no tensor {name} in its safetensors files; fetch the model again")
