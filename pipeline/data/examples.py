"""The two row types that travel through the pipeline: raw `Example` and tokenised `EncodedExample`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction row.

    Attributes:
        id: stable identifier, derived from the content (see `pipeline.data.sources`).
        instruction: the task, never empty.
        input: optional context, "" where there is none.
        references: acceptable responses; training uses the first.
        category: topic or category, "" where unknown.
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    category: str = ""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One tokenised training row: prompt tokens followed by response tokens and, if it fits, the end token.

    Attributes:
        id: the example's id.
        input_ids: token ids of prompt + response (+ eos); length L.
        prompt_tokens: P, the number of leading prompt tokens. Tokens P..L-1 are the response.
    """

    id: str
    input_ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One tokenised benchmark row.

    Attributes:
        id: the example's id.
        prompt: the prompt's text as tokenised.
        input_ids: token ids of the prompt.
        references: acceptable responses.
        category: topic or category.
    """

    id: str
    prompt: str
    input_ids: tuple[int, ...]
    references: tuple[str, ...]
    category: str = ""
