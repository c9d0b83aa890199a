"""Contaminated prompts: whole ones, and instructions alone."""

from __future__ import annotations

from pipeline.data.prompts import _WITH_INPUT, _WITHOUT_INPUT
from pipeline.reporting.overlap import overlap, seen


def prompt(instruction: str, context: str = "") -> str:
    return (_WITH_INPUT if context else _WITHOUT_INPUT).format(instruction=instruction, input=context)


TRAIN = seen([prompt("What is the meaning of life?"), prompt("Extract the dates.", "1 May"), prompt("Line one\n\nline two")])


def test_case_and_white_space_play_no_role() -> None:
    found = overlap("dolly", [prompt("what is the  meaning of LIFE?"), prompt("Something else")], "training", TRAIN)
    assert (found.prompts, found.same_prompt, found.same_instruction) == (2, 1, 1)
    assert found.named == ("what is the meaning of LIFE?",)


def test_an_instruction_with_another_input_is_told_apart() -> None:
    found = overlap("dolly", [prompt("Extract the dates.", "2 June"), prompt("Extract the dates.")], "dev", TRAIN)
    assert (found.same_prompt, found.same_instruction, found.part) == (0, 2, "dev")


def test_an_instruction_of_several_paragraphs_is_whole() -> None:
    assert overlap("x", [prompt("Line one")], "dev", TRAIN).same_instruction == 0
    assert overlap("x", [prompt("Line one\n\nline two", "in")], "dev", TRAIN).same_instruction == 1


def test_prompts_of_another_template_are_compared_whole() -> None:
    others = seen(["<user>hello</user>"])
    assert others.instructions == frozenset()
    found = overlap("chat", ["<user>Hello</user>", "<user>bye</user>"], "training", others)
    assert (found.same_prompt, found.same_instruction, found.named) == (1, 1, ("<user>Hello</user>",))
