"""Logit lens and fused objective on the heads of real architectures: scaled, capped, with bias, tied and untied.

The expectation is the model itself: its own forward pass, with a given tensor put in the place of its final state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.errors import ModelError
from pipeline.losses.fused import vocab_cross_entropy, vocab_divergence
from pipeline.models.lens import load_lens, logit_lens
from pipeline.teacher.online import layer_states

VOCAB, WIDTH, LAYERS = 61, 16, 3
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
MODERN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    **ENDS,
}
CLASSIC: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **ENDS}


@dataclass(frozen=True)
class Architecture:
    """A tiny configuration, where its final norm is, and what is special about its head."""

    config: str
    settings: dict[str, Any]
    norm: str = "model.norm"
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False


ARCHITECTURES = {
    "cohere": Architecture("CohereConfig", {**MODERN, "logit_scale": 0.25}, scale=0.25),
    "cohere2": Architecture("Cohere2Config", {**MODERN, "logit_scale": 0.5}, scale=0.5),
    "gemma": Architecture("GemmaConfig", {**MODERN, "head_dim": 4}),
    "gemma2": Architecture("Gemma2Config", {**MODERN, "head_dim": 4, "final_logit_softcapping": 3.0}, softcap=3.0),
    "gemma3": Architecture("Gemma3TextConfig", {**MODERN, "head_dim": 4}),
    "granite": Architecture(
        "GraniteConfig", {**MODERN, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}, scale=0.125
    ),
    "phi": Architecture("PhiConfig", MODERN, norm="model.final_layernorm", bias=True),
    "gptj": Architecture("GPTJConfig", {**CLASSIC, "rotary_dim": 4}, norm="transformer.ln_f", bias=True),
    "gpt_neox": Architecture("GPTNeoXConfig", MODERN, norm="gpt_neox.final_layer_norm"),
    "mistral": Architecture("MistralConfig", MODERN),
    "qwen3": Architecture("Qwen3Config", {**MODERN, "head_dim": 4}),
    "olmo2": Architecture("Olmo2Config", MODERN),
    "olmo": Architecture("OlmoConfig", MODERN),
    "nemotron": Architecture("NemotronConfig", {**MODERN, "head_dim": 4}),
    "nanochat": Architecture("NanoChatConfig", {**MODERN, "final_logit_softcapping": 2.0}, softcap=2.0),
    "phi3": Architecture("Phi3Config", MODERN),
    "falcon": Architecture(
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, **ENDS},
        norm="transformer.ln_f",
    ),
    "bloom": Architecture(
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4, **ENDS},
        norm="transformer.ln_f",
    ),
    "opt": Architecture(
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.3,
            "pad_token_id": 1,
        },
        norm="model.decoder.final_layer_norm",
    ),
}
BART = {"vocab_size": VOCAB, "d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 24}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}),
    "bert": ("BertConfig", {**MODERN, "is_decoder": True}),
    "bart": ("BartConfig", BART),
    "openai-gpt": ("OpenAIGPTConfig", {k: v for k, v in CLASSIC.items() if not k.startswith(("bos", "eos"))}),
    "gemma3": (
        "Gemma3Config",  # with its image encoder
        {
            "text_config": {**MODERN, "head_dim": 4},
            "vision_config": {
                "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
        },
    ),
    "opt": ("OPTConfig", {**ARCHITECTURES["opt"].settings, "do_layer_norm_before": False}),
}  # fmt: skip
SMALL_MIXER = {"mamba_d_ssm": 32, "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
FALCON_H1 = {**MODERN, **SMALL_MIXER, "head_dim": 4, "lm_head_multiplier": 0.5}


def build(config: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random model; biases and norm weights too, which initialisation leaves at 0 and 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make(name: str, seed: int = 0) -> PreTrainedModel:
    architecture = ARCHITECTURES[name]
    return build(architecture.config, architecture.settings, seed)


def head_of(model: PreTrainedModel, norm: str) -> Callable[[Tensor], Tensor]:
    """[N, d] final states → [N, V] logits, by the model's own forward pass."""

    def logits(final: Tensor) -> Tensor:
        handle = model.get_submodule(norm).register_forward_hook(lambda *_: final.unsqueeze(0))
        try:
            output = model(torch.zeros(1, len(final), dtype=torch.long), use_cache=False).logits[0]
        finally:
            handle.remove()
        return output

    return logits


def plain_jensen_shannon(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def plain_reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


PLAIN = {"jensen_shannon": plain_jensen_shannon, "reverse_kl": plain_reverse_kl}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_lens_knows_how_the_architecture_shapes_its_logits(name: str) -> None:
    architecture, model = ARCHITECTURES[name], make(name)
    lens = logit_lens(model)
    assert (lens.head.scale, lens.head.softcap) == (architecture.scale, architecture.softcap)
    assert (lens.head.bias is not None) == architecture.bias
    assert lens.norm is model.get_submodule(architecture.norm) and lens.num_layers == LAYERS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_lens_at_the_last_layer_gives_the_models_logits(name: str) -> None:
    model = make(name)
    ids = torch.randint(2, VOCAB, (2, 7))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, use_cache=False)
        found = logit_lens(model).logits(output.hidden_states[-1], LAYERS, final_norm=True)
    assert output.logits.abs().max() > 0.3  # nothing that a wrong scale could hide behind
    torch.testing.assert_close(found, output.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_final_norm_makes_the_final_state_of_the_last_blocks_output(name: str) -> None:
    model = make(name)
    lens = logit_lens(model)
    raw: list[Tensor] = []
    handle = lens_blocks(model)[-1].register_forward_hook(
        lambda _, __, output: raw.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        final = model(torch.randint(2, VOCAB, (2, 7)), output_hidden_states=True, use_cache=False).hidden_states[-1]
    handle.remove()
    assert not torch.allclose(raw[0], final, atol=1e-2)
    torch.testing.assert_close(lens.prepare(raw[0], LAYERS - 1, final_norm=True), final, rtol=1e-6, atol=1e-6)
    assert lens.prepare(final, LAYERS, final_norm=True) is final


def lens_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks, found by their number and kind alone."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == LAYERS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_teachers_states_are_those_that_the_student_sees(name: str) -> None:
    model = make(name)
    batch = collate([EncodedExample("a", (5, 9, 17, 30, 2, 8), 2), EncodedExample("b", (7, 9, 3), 1)], pad_token_id=0)
    found = layer_states(model, batch, range(LAYERS + 1))
    with torch.no_grad():
        expected = model.base_model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
    assert len(expected) == LAYERS + 1
    for layer, states in enumerate(expected):
        torch.testing.assert_close(found[layer], states.flatten(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("divergence", PLAIN)
def test_the_divergence_through_the_head_is_the_plain_one(name: str, divergence: str) -> None:
    architecture = ARCHITECTURES[name]
    student, teacher = make(name, seed=1).double(), make(name, seed=2).double()
    lens = logit_lens(student)
    student_states = (2 * torch.randn(9, WIDTH, dtype=torch.float64)).requires_grad_()
    teacher_states = 2 * torch.randn(9, WIDTH, dtype=torch.float64)
    wanted = [student_states, lens.head.weight] + ([] if lens.head.bias is None else [lens.head.bias])

    with torch.no_grad():
        teacher_logits = head_of(teacher, architecture.norm)(teacher_states)
    plain = PLAIN[divergence](teacher_logits, head_of(student, architecture.norm)(student_states)).mean()
    expected = torch.autograd.grad(plain, wanted)
    fused = vocab_divergence(
        student_states, lens.head, teacher_states, logit_lens(teacher).head, divergence=divergence, chunk_tokens=4
    )
    found = torch.autograd.grad(fused, wanted)

    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=0)
    assert len(found) == 2 + architecture.bias
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.norm()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite", "phi", "gptj", "mistral", "qwen3"])
def test_a_tied_head_passes_its_gradient_on_to_the_embeddings(name: str, tied: bool) -> None:
    architecture = ARCHITECTURES[name]
    student, teacher = (
        build(architecture.config, {**architecture.settings, "tie_word_embeddings": tied}, seed).double() for seed in (1, 2)
    )
    lens, embeddings = logit_lens(student), student.get_input_embeddings().weight
    assert (lens.head.weight is embeddings) == tied
    ids = torch.randint(2, VOCAB, (1, 7))
    with torch.no_grad():
        wanted = teacher(ids, output_hidden_states=True, use_cache=False)
    output = student(ids, output_hidden_states=True, use_cache=False)
    parameters = list(dict.fromkeys([embeddings, student.get_output_embeddings().weight]))
    expected = torch.autograd.grad(plain_reverse_kl(wanted.logits, output.logits).mean(), parameters, retain_graph=True)
    fused = vocab_divergence(
        output.hidden_states[-1][0], lens.head, wanted.hidden_states[-1][0], logit_lens(teacher).head, divergence="reverse_kl"
    )
    assert len(parameters) == 2 - tied
    for ours, theirs in zip(torch.autograd.grad(fused, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.norm()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cross_entropy_through_the_head_is_the_plain_one(name: str) -> None:
    student = make(name, seed=1).double()
    lens = logit_lens(student)
    states = (2 * torch.randn(9, WIDTH, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(VOCAB, (9,))
    wanted = [states, lens.head.weight] + ([] if lens.head.bias is None else [lens.head.bias])
    plain = -head_of(student, ARCHITECTURES[name].norm)(states).log_softmax(-1)[torch.arange(9), labels].mean()
    expected = torch.autograd.grad(plain, wanted)
    fused = vocab_cross_entropy(states, lens.head, labels, chunk_tokens=4)
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=0)
    for ours, theirs in zip(torch.autograd.grad(fused, wanted), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.norm()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_lens_read_from_disk_is_the_models(name: str, tied: bool, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = build(architecture.config, {**architecture.settings, "tie_word_embeddings": tied})
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    found, expected = load_lens(tiny.save(model, tmp_path / "m"), torch.device("cpu")), logit_lens(model)
    states = torch.randn(5, WIDTH)
    for layer in (1, LAYERS):
        assert torch.equal(found.logits(states, layer, final_norm=True), expected.logits(states, layer, final_norm=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_structure_that_is_not_understood_is_one_clear_error(name: str) -> None:
    model = build(*REFUSED[name])
    with pytest.raises(ModelError, match=rf"^{name}: no final norm found \(.*\); .* is not supported, use another$"):
        logit_lens(model)


def test_a_multiplier_that_is_not_understood_is_one_clear_error() -> None:
    model = build("FalconH1Config", FALCON_H1)
    with pytest.raises(ModelError, match=r"^falcon_h1: the model's logits are not .*would be wrong; use another model$"):
        logit_lens(model)


def test_a_scaling_that_another_architecture_means_otherwise_is_one_clear_error() -> None:
    """Granite divides its logits by `logits_scaling`, another architecture multiplies by it."""
    model = make("granite")
    model.lm_head.register_forward_hook(lambda module, args, output: output * model.config.logits_scaling**2)
    with pytest.raises(ModelError, match=r"^granite: the model's logits are not .*would be wrong; use another model$"):
        logit_lens(model)


def test_a_multiplier_is_noticed_in_small_logits() -> None:
    model = build("FalconH1Config", {**FALCON_H1, "initializer_range": 1e-3})
    with pytest.raises(ModelError, match="logit lens would be wrong"):
        logit_lens(model)


def test_a_projection_between_the_blocks_and_the_head_is_one_clear_error() -> None:
    model = build("OPTConfig", {**ARCHITECTURES["opt"].settings, "word_embed_proj_dim": WIDTH // 2})
    with pytest.raises(ModelError, match="^opt: "):
        logit_lens(model)
