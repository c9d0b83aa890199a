"""Encoding: joining, cutting, dropping, counting; and the files it goes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from rows import encode_training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.examples import EncodedExample, EncodedPrompt, Example
from pipeline.data.prompts import render
from pipeline.data.tokenize import (
    EncodingCounts,
    PromptCounts,
    encode_prompts,
    prompt_chunks,
    read_encoded,
    read_prompts,
    training_chunks,
    write_encoded,
    write_prompts,
)
from pipeline.errors import ArtifactError, ConfigError, ModelError

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT = "<s>{% for message in messages %}<|user|>{{ message.content }}{% endfor %}<|assistant|>"


def tokenizer(post: str | None = None, chat: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `post` is what it puts around a text, as Llama's ("<s> $A") does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([render("alpaca", "word", "context", tiny.tokenizer())] * 4, trainer)
    if post:
        pairs = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=post, special_tokens=pairs)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|user|>", "<|assistant|>"]
    )
    fast.chat_template = chat
    return fast


def example(instruction: str = "Say it.", context: str = "", *references: str, name: str = "a") -> Example:
    return Example(name, instruction, context, references or ("It.",), "topic")


def plain(tok: Any, text: str) -> tuple[int, ...]:
    return tuple(tok(text, add_special_tokens=False).input_ids)


# Joining


def test_prompt_first_response_and_end_token_are_encoded_apart_and_joined() -> None:
    tok = tokenizer()
    row = example("Say it.", "", " It is.", "other")
    (encoded,), counts = encode_training([row], tok, "alpaca")
    prompt = plain(tok, render("alpaca", "Say it.", "", tok))
    assert encoded == EncodedExample("a", (*prompt, *plain(tok, " It is."), tok.eos_token_id), len(prompt))
    assert counts == EncodingCounts(rows=1, kept=1, empty_response=0, overlong_prompt=0, truncated_context=0, cut_response=0)


@pytest.mark.parametrize(
    ("post", "front"),
    [(None, ()), ("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("$A </s>", ())],
    ids=["none", "bos", "both", "eos"],
)
def test_special_tokens_stand_in_front_of_a_prompt_and_never_behind_it(post: str | None, front: tuple[int, ...]) -> None:
    tok = tokenizer(post)
    row = example()
    (encoded,), _ = encode_training([row], tok, "alpaca")
    (prompt,), _ = encode_prompts([row], tok, "alpaca")
    expected = (*front, *plain(tok, render("alpaca", "Say it.", "", tok)))
    assert prompt.input_ids == expected
    assert encoded.input_ids == (*expected, *plain(tok, "It."), 1)
    assert encoded.prompt_tokens == len(expected)


def test_a_chat_prompt_gets_no_special_tokens_beyond_those_it_spells_out() -> None:
    tok = tokenizer("<s> $A", CHAT)
    (prompt,), _ = encode_prompts([example("Say it.", "Now.")], tok, "chat")
    assert prompt.prompt == "<s><|user|>Say it.\n\nNow.<|assistant|>"
    assert prompt.input_ids == (0, 2, *plain(tok, "Say it.\n\nNow."), 3)


@pytest.mark.parametrize("text", ["naïve – café", "👩‍👩‍👧‍👦", "مرحبا بالعالم", "a\r\nb\u2028c"])
def test_any_text_comes_back_from_the_tokens(text: str) -> None:
    tok = tokenizer()
    (encoded,), _ = encode_training([example(text, text, text)], tok, "alpaca", 512, 1024)
    assert tok.decode(encoded.input_ids[: encoded.prompt_tokens]) == render("alpaca", text, text, tok)
    assert tok.decode(encoded.input_ids[encoded.prompt_tokens :]) == text + "</s>"


def test_rows_come_out_in_order_whatever_the_chunks() -> None:
    rows = [example(f"Question {index}", "", f"Answer {index}", name=str(index)) for index in range(600)]
    encoded, counts = encode_training(iter(rows), tokenizer(), "alpaca")
    assert [row.id for row in encoded] == [row.id for row in rows]
    assert (counts.rows, counts.kept) == (600, 600)
    alone, _ = encode_training(rows[431:432], tokenizer(), "alpaca")
    assert encoded[431] == alone[0]
    prompts, found = encode_prompts(iter(rows), tokenizer(), "alpaca")
    assert [row.id for row in prompts] == [row.id for row in rows] and (found.rows, found.kept) == (600, 600)


def test_a_chunk_is_encoded_when_it_is_asked_for_and_counted_alone() -> None:
    taken: list[int] = []

    def rows() -> Iterator[Example]:
        for index in range(600):
            taken.append(index)
            yield example(f"Question {index}", "", " " if index == 1 else "Answer", name=str(index))

    for found in (training_chunks(rows(), tokenizer(), "alpaca"), prompt_chunks(rows(), tokenizer(), "alpaca")):
        taken.clear()
        encoded, counts = next(found)
        assert counts.rows == len(taken) == 256
        assert counts.kept == len(encoded)


# Limits


def test_a_long_response_is_cut_and_loses_its_end_token() -> None:
    tok = tokenizer()
    (whole,), _ = encode_training([example("Say it.", "", "word " * 30)], tok, "alpaca", 250, 500)
    length, prompt = len(whole.input_ids), whole.prompt_tokens
    for limit, cut in ((length, 0), (length - 1, 1), (prompt + 1, 1)):
        (encoded,), counts = encode_training([example("Say it.", "", "word " * 30)], tok, "alpaca", prompt, limit)
        assert encoded.input_ids == whole.input_ids[:limit]
        assert counts.cut_response == cut


def test_a_prompt_over_the_limit_is_dropped_and_counted() -> None:
    tok = tokenizer()
    rows = [example(name="short"), example("Say it. " * 20, name="long")]
    limit = len(plain(tok, render("alpaca", rows[0].instruction, "", tok)))
    encoded, counts = encode_training(rows, tok, "alpaca", limit, 500)
    assert [row.id for row in encoded] == ["short"]
    assert counts == EncodingCounts(rows=2, kept=1, empty_response=0, overlong_prompt=1, truncated_context=0, cut_response=0)
    prompts, found = encode_prompts(rows, tok, "alpaca", limit)
    assert [row.id for row in prompts] == ["short"]
    assert found == PromptCounts(rows=2, kept=1, overlong_prompt=1, truncated_context=0)
    assert encode_prompts(rows[:1], tok, "alpaca", limit - 1)[1].overlong_prompt == 1


@pytest.mark.parametrize("response", ["", " \n\t"])
def test_a_blank_response_is_dropped_from_training_and_kept_in_a_benchmark(response: str) -> None:
    row = example("Say it.", "", response, "second")
    encoded, counts = encode_training([row], tokenizer(), "alpaca")
    assert encoded == []
    assert counts == EncodingCounts(rows=1, kept=0, empty_response=1, overlong_prompt=0, truncated_context=0, cut_response=0)
    (prompt,), _ = encode_prompts([row], tokenizer(), "alpaca")
    assert prompt.references == (response, "second")


def test_a_response_without_tokens_is_dropped() -> None:
    core = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1}, merges=[]))
    core.add_special_tokens(["</s>"])
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    encoded, counts = encode_training([example("a", "", "a"), example("a", "", "zzz")], tok, "alpaca")
    assert (len(encoded), counts.empty_response) == (1, 1)


def test_limits_without_room_for_a_response() -> None:
    with pytest.raises(
        ConfigError, match="max_prompt_tokens=64 leaves no room for a response within max_tokens=64; lower the first or"
    ):
        encode_training([example()], tokenizer(), "alpaca", 64, 64)


# Truncation


CONTEXT = " ".join(f"word{index}" for index in range(200))


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("spare", [2, 3, 20, 101])
def test_truncation_cuts_the_middle_of_the_context_and_fills_the_limit(template: str, spare: int) -> None:
    tok = tokenizer("<s> $A", CHAT)
    bare = encode_prompts([example("Sum up.", "x")], tok, template)[0][0]
    limit = len(bare.input_ids) + spare + 10
    row = example("Sum up.", CONTEXT)
    (prompt,), counts = encode_prompts([row], tok, template, limit, "truncate_context")
    assert counts == PromptCounts(rows=1, kept=1, overlong_prompt=0, truncated_context=1)
    assert limit - 3 <= len(prompt.input_ids) <= limit
    before, after = render(template, "Sum up.", "\0", tok).split("\0")
    assert prompt.prompt.startswith(before) and prompt.prompt.endswith(after)
    head, tail = prompt.prompt[len(before) : -len(after)].split(" ... ")
    assert head and CONTEXT.startswith(head) and CONTEXT.endswith(tail)
    assert abs(len(plain(tok, head)) - len(plain(tok, tail))) <= 2
    (encoded,), trained = encode_training([row], tok, template, limit, 500, "truncate_context")
    assert encoded.input_ids[: encoded.prompt_tokens] == prompt.input_ids
    assert (trained.kept, trained.truncated_context, trained.overlong_prompt) == (1, 1, 0)


@pytest.mark.parametrize("text", ["naïve – café ", "👩‍👩‍👧‍👦 ", "مرحبا بالعالم "])
def test_truncation_never_splits_a_character(text: str) -> None:
    tok = tokenizer()
    context = text * 60
    for limit in range(240, 250):
        (prompt,), _ = encode_prompts([example("Sum up.", context)], tok, "alpaca", limit, "truncate_context")
        kept = prompt.prompt.split("### Input:\n")[1].split("\n\n### Response")[0]
        head, tail = kept.split(" ... ")
        assert context.startswith(head) and context.endswith(tail)
        assert len(prompt.input_ids) <= limit


def test_truncation_leaves_short_rows_alone_and_drops_what_has_no_context_to_cut() -> None:
    tok = tokenizer()
    rows = [example("Sum up.", "short", name="a"), example("word " * 200, name="b"), example("word " * 200, CONTEXT, name="c")]
    plain_prompts, _ = encode_prompts(rows[:1], tok, "alpaca", 150)
    prompts, counts = encode_prompts(rows, tok, "alpaca", 150, "truncate_context")
    assert prompts == plain_prompts
    assert counts == PromptCounts(rows=3, kept=1, overlong_prompt=2, truncated_context=0)


def test_truncation_needs_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer()
    monkeypatch.setattr(type(tok), "is_fast", property(lambda _: False))
    with pytest.raises(ModelError, match="gives no character offsets; set data.overlong=drop"):
        encode_prompts([example("Sum up.", CONTEXT)], tok, "alpaca", 150, "truncate_context")


def test_a_tokenizer_without_an_end_token() -> None:
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(ModelError, match="has no end-of-sequence token, so responses could never end"):
        encode_training([example()], tok, "alpaca")


# Files


def many(count: int) -> list[EncodedExample]:
    return [EncodedExample(f"é{index}", tuple(range(index % 7 + 2)), index % 3 % (index % 7 + 1) + 1) for index in range(count)]


@pytest.mark.parametrize("count", [0, 1, 1024, 2500])
def test_encoded_rows_survive_the_file(tmp_path: Path, count: int) -> None:
    rows = many(count)
    write_encoded(tmp_path / "rows.arrow", rows)
    found = read_encoded(tmp_path / "rows.arrow")
    assert len(found) == count
    assert list(found) == rows
    assert found.ids == [row.id for row in rows]
    assert list(found.lengths) == [len(row.input_ids) - 1 for row in rows]
    assert list(found.response_counts) == [len(row.input_ids) - row.prompt_tokens for row in rows]
    assert found[count - 1] == rows[-1] if rows else True
    with pytest.raises(IndexError):
        found[count]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_encoded_rows_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    write_encoded(tmp_path / "rows.arrow", [EncodedExample(str(index), tuple(range(1000)), 10) for index in range(1024)])
    before = pa.total_allocated_bytes()
    found = read_encoded(tmp_path / "rows.arrow")
    assert found[1000].input_ids == tuple(range(1000))
    assert str(tmp_path / "rows.arrow") in Path("/proc/self/maps").read_text()
    assert pa.total_allocated_bytes() - before < 100_000 < (tmp_path / "rows.arrow").stat().st_size


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_encoded(tmp_path / name, many(50))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("count", [0, 3, 1500])
def test_prompts_survive_the_file(tmp_path: Path, count: int) -> None:
    rows = [
        EncodedPrompt(
            str(index), f"prompt 👍 {index}\r\n", tuple(range(index % 5 + 1)), ("a", "") if index % 2 else ("b",), "é"
        )
        for index in range(count)
    ]
    write_prompts(tmp_path / "prompts.arrow", rows)
    assert read_prompts(tmp_path / "prompts.arrow") == rows


@pytest.mark.parametrize("read", [read_encoded, read_prompts])
def test_a_missing_damaged_or_foreign_file(tmp_path: Path, read: Any) -> None:
    write_encoded(tmp_path / "whole", many(5))
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "torn").write_bytes(content[: len(content) // 2])
    for name in ("absent", "empty", "torn"):
        with pytest.raises(
            ArtifactError, match=f"^{tmp_path}/{name}: cannot be read .+; remove its folder and run again to rebuild it$"
        ):
            read(tmp_path / name)
    other = pa.table({"other": [1]})
    with pa.OSFile(str(tmp_path / "foreign"), "wb") as sink, pa.ipc.new_file(sink, other.schema) as writer:
        writer.write_table(other)
    with pytest.raises(ArtifactError, match=r"foreign: has columns \['other'\], expected \['id', .*'input_ids'"):
        read(tmp_path / "foreign")
