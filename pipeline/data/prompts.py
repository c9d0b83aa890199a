"""Prompt templates, each with a version that goes into fingerprints: raise it when its text changes."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, ModelError

_VERSIONS = {"alpaca": 1, "chat": 1}

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def template_id(template_name: str) -> str:
    """The template's name and version, for example `alpaca@1`.

    Raises:
        ConfigError: there is no such template.
    """
    if template_name not in _VERSIONS:
        raise ConfigError(f"template: {template_name!r} is not known; allowed: {', '.join(_VERSIONS)}")
    return f"{template_name}@{_VERSIONS[template_name]}"


def render(template_name: str, instruction: str, input: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt of one row, up to where the response begins.

    `alpaca` is the paper's text, byte for byte; rows with an empty input have their own variant. `chat` is the tokenizer's
    own chat template with one user message: the instruction and, after a blank line, the input.

    Raises:
        ConfigError: there is no such template.
        ModelError: `chat`, and the tokenizer has no chat template or one that fails.
    """
    template_id(template_name)
    if template_name == "chat":
        return _chat(instruction, input, tokenizer)
    return (_WITH_INPUT if input else _WITHOUT_INPUT).format(instruction=instruction, input=input)


def holds_special_tokens(template_name: str) -> bool:
    """Whether the rendered text spells out its special tokens, so that the tokenizer must not add them again."""
    return template_name == "chat"


def _chat(instruction: str, input: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            f"template 'chat': the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template; "
            "set data.template=alpaca, or use an instruction-tuned model's tokenizer"
        )
    content = f"{instruction}\n\n{input}" if input else instruction
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ModelError(
            f"template 'chat': the chat template of {tokenizer.name_or_path} fails ({error}); set data.template=alpaca"
        ) from error
    return str(text)
