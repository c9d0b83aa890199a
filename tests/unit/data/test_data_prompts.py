"""Prompt templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipeline.data.prompts import render, template_id
from pipeline.errors import ConfigError, ModelError

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(template: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_alpaca_with_and_without_input() -> None:
    assert render("alpaca", "Add.", "1 {and} 2", tiny.tokenizer()) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {and} 2\n\n### Response:\n"
    )
    assert render("alpaca", "Say {x} é 👍", "", tiny.tokenizer()) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {x} é 👍\n\n### Response:\n"
    )
    assert "### Input:\n \n" in render("alpaca", "Add.", " ", tiny.tokenizer())


@pytest.mark.parametrize("name", ["dolly_dev", "dolly_test", "s_ni", "self_inst", "vicuna"])
def test_alpaca_is_the_papers_prompt_byte_for_byte(shared: Path, name: str) -> None:
    lines = (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 20
    tokenizer = tiny.tokenizer()
    for row in rows:
        assert render("alpaca", row["instruction"], row.get("input", ""), tokenizer) == row["prompt"]


def test_chat_is_the_tokenizers_own_template_up_to_the_answer() -> None:
    tokenizer = chat_tokenizer(CHAT)
    assert render("chat", "Add.", "", tokenizer) == "<|user|>Add.<|end|><|assistant|>"
    assert render("chat", "Add.", "1 2", tokenizer) == "<|user|>Add.\n\n1 2<|end|><|assistant|>"


def test_chat_without_a_chat_template() -> None:
    with pytest.raises(
        ModelError, match="template 'chat': the tokenizer .+ has no chat template; set data.template=alpaca, or use"
    ):
        render("chat", "Add.", "", tiny.tokenizer())


def test_a_chat_template_that_fails() -> None:
    with pytest.raises(ModelError, match=r"the chat template of .* fails \(only system\); set data.template=alpaca"):
        render("chat", "Add.", "", chat_tokenizer("{{ raise_exception('only system') }}"))


def test_template_ids_carry_a_version_and_unknown_names_are_errors() -> None:
    assert (template_id("alpaca"), template_id("chat")) == ("alpaca@1", "chat@1")
    for use in (template_id, lambda name: render(name, "Add.", "", tiny.tokenizer())):
        with pytest.raises(ConfigError, match="template: 'alpacca' is not known; allowed: alpaca, chat"):
            use("alpacca")
