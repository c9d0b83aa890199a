"""Tiny random models and a tiny tokenizer, made from nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.training.loop import Settings

WORDS = "the cat sat on a mat and saw red blue green birds fly over hills while rain fell softly in town".split()

_SETTINGS = Settings(
    seed=3,
    epochs=None,
    max_steps=6,
    batch_size=4,
    micro_batch_size=4,
    learning_rate=5e-3,
    min_learning_rate=0.0,
    schedule="cosine",
    warmup_steps=1,
    weight_decay=0.01,
    betas=(0.9, 0.999),
    max_grad_norm=1.0,
    autocast=None,
    checkpoint_every=2,
    validate_every=3,
    select="last",
    backend="eager",
)


def settings(**changes: Any) -> Settings:
    """A short training of a tiny model."""
    return replace(_SETTINGS, **changes)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 entries, end token = pad token, no beginning token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def llama(layers: int = 4, width: int = 32, vocab: int = 300, tie: bool = True, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def qwen2(layers: int = 4, width: int = 32, vocab: int = 300, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).eval()


def gpt2(layers: int = 4, width: int = 32, vocab: int = 300, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=1024,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A transformers folder with the tiny tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Instruction rows of tiny words, no two alike."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return [
        {"instruction": f"row {index}: {words(2, 6)}", "input": words(1, 5) if index % 2 else "", "output": words(2, 12)}
        for index in range(count)
    ]


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """A JSONL file of tiny rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)), encoding="utf-8")
    return path
