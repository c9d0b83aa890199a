"""The encoding of the paper's code on real rows: input ids, shifted labels and dropped rows, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows import encode_training, read_examples
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.data.sources import LocalSource
from pipeline.data.tokenize import EncodingCounts


@pytest.fixture(scope="module")
def golden(shared: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((shared / "golden" / "encoding_gpt2.json").read_text(encoding="utf-8"))
    assert len(rows) == 24
    return rows


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    return loaded


def encode(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, folder: Path, max_prompt_tokens: int = 256
) -> tuple[list[EncodedExample], EncodingCounts]:
    path = folder / "rows.json"
    path.write_text(json.dumps([{name: row[name] for name in ("instruction", "input", "output")} for row in rows]))
    return encode_training(read_examples(LocalSource(path)), tokenizer, "alpaca", max_prompt_tokens, 512)


def test_inputs_and_shifted_labels(golden: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    encoded, counts = encode(golden, tokenizer, tmp_path)
    expected = [row for row in golden if not row["dropped"]]
    assert (counts.kept, counts.overlong_prompt) == (len(expected), len(golden) - len(expected))
    for row, wanted in zip(encoded, expected, strict=True):
        batch = collate([row], pad_token_id=50256)
        assert batch.input_ids[0].tolist() == wanted["input_ids"]
        assert batch.labels[0].tolist() == wanted["labels"]
        assert row.prompt_tokens == wanted["prompt_tokens"]


def test_rows_are_the_same_in_a_padded_batch(
    golden: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    encoded, _ = encode(golden, tokenizer, tmp_path)
    batch = collate(encoded, pad_token_id=50256)
    for index, wanted in enumerate(golden):
        length = len(wanted["input_ids"])
        assert batch.input_ids[index, :length].tolist() == wanted["input_ids"]
        assert batch.attention_mask[index].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert batch.labels[index, :length].tolist() == wanted["labels"]
        assert set(batch.labels[index, length:].tolist()) <= {-100}


@pytest.mark.parametrize("limit", [41, 50, 126, 127])
def test_rows_over_the_prompt_limit_are_dropped(
    golden: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, limit: int
) -> None:
    # No golden row is over 256 tokens, so the limit comes to the rows.
    encoded, counts = encode(golden, tokenizer, tmp_path, limit)
    kept = [row for row in golden if row["prompt_tokens"] <= limit]
    assert 0 < len(kept) < len(golden)
    assert [row.prompt_tokens for row in encoded] == [row["prompt_tokens"] for row in kept]
    assert counts.overlong_prompt == len(golden) - len(kept)
