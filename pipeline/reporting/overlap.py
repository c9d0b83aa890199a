"""Contaminated prompts: test prompts that also occur in the rows that a student was trained on or chosen by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Up to the context or the response marker of the alpaca template; other templates do not tell where an instruction ends.
_INSTRUCTION = re.compile(r"### Instruction:\n(.*?)\n\n### (?:Input|Response):", re.DOTALL)
_SHOWN = 3


@dataclass(frozen=True)
class Seen:
    """Prompts of some rows, normalised: case and white space play no role.

    Attributes:
        prompts: whole prompts, instruction and input.
        instructions: instructions alone, as far as the template tells where they end.
    """

    prompts: frozenset[str]
    instructions: frozenset[str]


@dataclass(frozen=True)
class Overlap:
    """Prompts of a benchmark that occur elsewhere.

    Attributes:
        benchmark: its name.
        part: where: "training" or "dev".
        prompts: prompts of the benchmark.
        same_prompt: those whose instruction and input occur there.
        same_instruction: those whose instruction occurs there, with whatever input; at least `same_prompt`.
        named: the first few instructions of those.
    """

    benchmark: str
    part: str
    prompts: int
    same_prompt: int
    same_instruction: int
    named: tuple[str, ...]


def seen(prompts: Iterable[str]) -> Seen:
    """Normalise the prompts of training or dev rows."""
    texts = list(prompts)
    instructions = (_instruction(text) for text in texts)
    return Seen(frozenset(map(_normal, texts)), frozenset(_normal(text) for text in instructions if text is not None))


def overlap(benchmark: str, prompts: Sequence[str], part: str, others: Seen) -> Overlap:
    """Count the prompts of a benchmark that are among others, in the same template."""
    same = [text for text in prompts if _normal(text) in others.prompts]
    alike = [text for text in prompts if _normal(text) in others.prompts or _known(text, others)]
    named = dict.fromkeys(" ".join((_instruction(text) or text).split()) for text in alike)
    return Overlap(benchmark, part, len(prompts), len(same), len(alike), tuple(named)[:_SHOWN])


def _known(text: str, others: Seen) -> bool:
    instruction = _instruction(text)
    return instruction is not None and _normal(instruction) in others.instructions


def _instruction(text: str) -> str | None:
    found = _INSTRUCTION.search(text)
    return None if found is None else found[1]


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
