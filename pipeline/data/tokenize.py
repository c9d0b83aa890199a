"""Examples become token ids, and token ids become memory-mapped Arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from pipeline.data.examples import EncodedExample, EncodedPrompt, Example
from pipeline.data.prompts import holds_special_tokens, render
from pipeline.errors import ArtifactError, ConfigError, ModelError

Overlong = Literal["drop", "truncate_context"]
T = TypeVar("T")

GAP = " ... "
"""Stands in a truncated context for what was cut."""

_CHUNK_ROWS = 256
_BATCH_ROWS = 1024
_EXAMPLES = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("prompt_tokens", pa.int32())])
_PROMPTS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("references", pa.list_(pa.string())),
        ("category", pa.string()),
    ]
)


@dataclass(frozen=True)
class EncodingCounts:
    """What became of the training rows; rows = kept + empty_response + overlong_prompt.

    Attributes:
        rows: rows seen.
        kept: rows encoded.
        empty_response: rows left out because there is nothing to learn: the first reference is blank or has no token.
        overlong_prompt: rows left out because their prompt is longer than allowed (and could not be truncated).
        truncated_context: kept rows whose input was cut in the middle.
        cut_response: kept rows whose response was cut at the token limit, so that they have no end token.
    """

    rows: int
    kept: int
    empty_response: int
    overlong_prompt: int
    truncated_context: int
    cut_response: int

    def __add__(self, other: EncodingCounts) -> EncodingCounts:
        return EncodingCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class PromptCounts:
    """What became of a benchmark's rows; rows = kept + overlong_prompt. The fields are those of `EncodingCounts`."""

    rows: int
    kept: int
    overlong_prompt: int
    truncated_context: int

    def __add__(self, other: PromptCounts) -> PromptCounts:
        return PromptCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class _Prompt:
    text: str
    ids: tuple[int, ...]
    truncated: bool = False


class EncodedDataset:
    """Tokenised rows in a memory-mapped file: only rows that are asked for are read.

    Attributes:
        ids: example id of each row.
        lengths: input tokens of each row, L − 1: the last token is only ever a label.
        response_counts: response tokens of each row.
    """

    def __init__(self, table: pa.Table) -> None:
        self._tokens, self._prompt_tokens = table["input_ids"], table["prompt_tokens"]
        tokens = pc.list_value_length(self._tokens)
        self.ids: list[str] = table["id"].to_pylist()
        self.lengths: list[int] = pc.subtract(tokens, 1).to_pylist()
        self.response_counts: list[int] = pc.subtract(tokens, self._prompt_tokens).to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> EncodedExample:
        return EncodedExample(self.ids[index], tuple(self._tokens[index].as_py()), self._prompt_tokens[index].as_py())

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[index] for index in range(len(self)))


def training_chunks(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_tokens: int = 256,
    max_tokens: int = 512,
    overlong: Overlong = "drop",
) -> Iterator[tuple[list[EncodedExample], EncodingCounts]]:
    """Encode prompt and first reference separately and join them, with the end token, as the paper's code does.

    Args:
        examples: the rows.
        tokenizer: a fast tokenizer with an end token.
        template: name of a prompt template.
        max_prompt_tokens: longest prompt.
        max_tokens: longest row, L; the response is cut there. Greater than `max_prompt_tokens`.
        overlong: what happens to longer prompts (hazard 8): "drop" (paper), or "truncate_context", which cuts the middle
            out of the input and drops the row only if that is not enough.

    Returns:
        Some rows at a time, in order, with what became of those that they come from: only so many are held.

    Raises:
        ConfigError: there is no such template, or the limits leave no room for a response.
        ModelError: the tokenizer has no end token, or lacks what `template` (a chat template) or `overlong` (offsets) need.
    """
    if max_prompt_tokens >= max_tokens:
        raise ConfigError(
            f"max_prompt_tokens={max_prompt_tokens} leaves no room for a response within max_tokens={max_tokens}; "
            "lower the first or raise the second"
        )
    eos = _eos(tokenizer)
    for chunk in chunks(examples):
        encoded: list[EncodedExample] = []
        empty = dropped = truncated = cut = 0
        prompts = _encode_chunk(chunk, tokenizer, template, max_prompt_tokens, overlong)
        responses = _token_ids(tokenizer, [example.references[0] for example in chunk])
        for example, prompt, response in zip(chunk, prompts, responses, strict=True):
            if not response or not example.references[0].strip():
                empty += 1
            elif prompt is None:
                dropped += 1
            else:
                ids = (*prompt.ids, *response, eos)
                truncated += prompt.truncated
                cut += len(ids) > max_tokens
                encoded.append(EncodedExample(example.id, ids[:max_tokens], len(prompt.ids)))
        yield encoded, EncodingCounts(len(chunk), len(encoded), empty, dropped, truncated, cut)


def prompt_chunks(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_tokens: int = 256,
    overlong: Overlong = "drop",
) -> Iterator[tuple[list[EncodedPrompt], PromptCounts]]:
    """Encode the prompts of a benchmark; arguments, result and errors as for `training_chunks`."""
    for chunk in chunks(examples):
        encoded: list[EncodedPrompt] = []
        dropped = truncated = 0
        prompts = _encode_chunk(chunk, tokenizer, template, max_prompt_tokens, overlong)
        for example, prompt in zip(chunk, prompts, strict=True):
            if prompt is None:
                dropped += 1
            else:
                truncated += prompt.truncated
                encoded.append(EncodedPrompt(example.id, prompt.text, prompt.ids, example.references, example.category))
        yield encoded, PromptCounts(len(chunk), len(encoded), dropped, truncated)


def encode_prompts(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_tokens: int = 256,
    overlong: Overlong = "drop",
) -> tuple[list[EncodedPrompt], PromptCounts]:
    """All rows of `prompt_chunks` at once."""
    encoded, counts = [], PromptCounts(0, 0, 0, 0)
    for rows, found in prompt_chunks(examples, tokenizer, template, max_prompt_tokens, overlong):
        encoded += rows
        counts += found
    return encoded, counts


def chunks(rows: Iterable[T], size: int = _CHUNK_ROWS) -> Iterator[list[T]]:
    """Rows in lists of `size`, the last one shorter: as many as are tokenised together."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, size)):
        yield chunk


def write_encoded(path: Path, examples: Iterable[EncodedExample]) -> None:
    """Write tokenised rows, as they come, as Arrow IPC: id, input_ids, prompt_tokens."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _EXAMPLES) as writer:
        for rows in chunks(examples, _BATCH_ROWS):
            columns: list[list[object]] = [
                [row.id for row in rows],
                [row.input_ids for row in rows],
                [row.prompt_tokens for row in rows],
            ]
            writer.write_batch(_record_batch(columns, _EXAMPLES))


def read_encoded(path: Path) -> EncodedDataset:
    """Open rows written by `write_encoded`.

    Raises:
        ArtifactError: the file is missing, damaged or holds something else.
    """
    return EncodedDataset(_read(path, _EXAMPLES))


def write_prompts(path: Path, prompts: Iterable[EncodedPrompt]) -> None:
    """Write tokenised benchmark rows, as they come, as Arrow IPC: id, prompt, input_ids, references, category."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _PROMPTS) as writer:
        for rows in chunks(prompts, _BATCH_ROWS):
            columns: list[list[object]] = [
                [row.id for row in rows],
                [row.prompt for row in rows],
                [row.input_ids for row in rows],
                [row.references for row in rows],
                [row.category for row in rows],
            ]
            writer.write_batch(_record_batch(columns, _PROMPTS))


def read_prompts(path: Path) -> list[EncodedPrompt]:
    """Read rows written by `write_prompts`.

    Raises:
        ArtifactError: the file is missing, damaged or holds something else.
    """
    rows = _read(path, _PROMPTS).to_pylist()
    return [
        EncodedPrompt(row["id"], row["prompt"], tuple(row["input_ids"]), tuple(row["references"]), row["category"])
        for row in rows
    ]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, so responses could never end; "
            "set its eos_token"
        )
    return int(tokenizer.eos_token_id)


def _encode_chunk(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, limit: int, overlong: Overlong
) -> list[_Prompt | None]:
    """A prompt for each example; None where it is too long."""
    texts = [render(template, example.instruction, example.input, tokenizer) for example in examples]
    prompts: list[_Prompt | None] = []
    for example, text, ids in zip(examples, texts, _prompt_ids(tokenizer, template, texts), strict=True):
        if len(ids) <= limit:
            prompts.append(_Prompt(text, ids))
        elif overlong == "truncate_context":
            prompts.append(_truncate(example, len(ids) - limit, tokenizer, template, limit))
        else:
            prompts.append(None)
    return prompts


def _truncate(example: Example, excess: int, tokenizer: PreTrainedTokenizerBase, template: str, limit: int) -> _Prompt | None:
    """The prompt with the middle of its input cut out; None if even an input of one token is too long."""
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer {tokenizer.name_or_path} gives no character offsets; set data.overlong=drop")
    spans = tokenizer(example.input, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    keep = len(spans) - excess - 1
    while keep > 0:
        head, tail = spans[: (keep + 1) // 2], spans[len(spans) - keep // 2 :]
        end = example.input[tail[0][0] :] if tail else ""
        text = render(template, example.instruction, example.input[: head[-1][1]] + GAP + end, tokenizer)
        ids = _prompt_ids(tokenizer, template, [text])[0]
        if len(ids) <= limit:
            return _Prompt(text, ids, truncated=True)
        keep -= len(ids) - limit
    return None


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, template: str, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids with the special tokens that the tokenizer puts in front, such as a BOS, but none that it puts behind."""
    if holds_special_tokens(template):
        return [tuple(ids) for ids in _token_ids(tokenizer, texts)]
    batch = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
    kept = []
    for ids, special in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        end = len(ids)
        while end and special[end - 1]:
            end -= 1
        kept.append(tuple(ids[:end]))
    return kept


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def _record_batch(columns: Sequence[Sequence[object]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); remove its folder and run again to rebuild it") from None
    if table.schema != schema:
        raise ArtifactError(
            f"{path}: has columns {table.schema.names}, expected {schema.names}; remove its folder and run again"
        )
    return table
