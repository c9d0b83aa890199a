"""Tiny random models whose logits are far enough apart that rounding changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from pipeline.data.examples import EncodedPrompt

VOCABULARY, END, CONTEXT = 61, 60, 64
_HEAD = 300  # rows of the heads in tests/tiny.py


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    # Tiny products gain nothing from a second thread, and wait long for it on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(kind: str) -> GPT2Config | LlamaConfig | Qwen2Config:
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4,
            bos_token_id=END, eos_token_id=END,
        )  # fmt: skip
    config = LlamaConfig if kind == "llama" else Qwen2Config
    return config(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, PreTrainedModel]:
    models = {}
    for kind in ("gpt2", "llama", "qwen2"):
        torch.manual_seed(7)
        models[kind] = AutoModelForCausalLM.from_config(_config(kind)).eval()
    return models


@pytest.fixture(params=["gpt2", "llama", "qwen2"])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models[request.param]


class WordTokenizer(SimpleNamespace):
    """Writes token 5 as "w5"; the end token doubles as padding, as in GPT-2."""

    eos_token_id = END
    pad_token_id = None

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return " " + " ".join(f"w{token}" for token in ids if not (skip_special_tokens and token == END)) + " "


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def prompts() -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 17, 8, 1, 12, 8, 5, 20, 2, 9, 14]
    return [
        EncodedPrompt(
            id=f"row-{index}",
            prompt=f"prompt {index}",
            input_ids=tuple(torch.randint(0, END, (length,), generator=generator).tolist()),
            references=(f"w{index} w1", "w2"),
            category=f"kind {index % 2}",
        )
        for index, length in enumerate(lengths)
    ]


@pytest.fixture
def logit_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product with a head from now on: how many positions' logits were held at a time."""
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def watched(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape[0] == _HEAD:
            seen.append(states.shape[0])
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    return seen
