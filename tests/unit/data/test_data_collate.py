"""Padding, shifting and masking."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.collate import IGNORE_INDEX, collate
from pipeline.data.examples import EncodedExample

EOS = 9
ROWS = [EncodedExample("a", (1, 2, 3, 4, EOS), 2), EncodedExample("b", (5, EOS, 6), 2)]
NO = IGNORE_INDEX


def test_labels_are_shifted_once_and_cover_the_response_alone() -> None:
    batch = collate(ROWS, pad_token_id=0)
    assert batch.example_ids == ("a", "b")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [5, EOS, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[NO, 3, 4, EOS], [NO, 6, NO, NO]]
    assert batch.response_positions.tolist() == [1, 2, 3, 5]
    assert batch.response_labels.tolist() == [3, 4, EOS, 6]
    assert batch.response_counts == (3, 1)


def test_padding_with_the_end_token_masks_no_real_end_token() -> None:
    other, same = collate(ROWS, pad_token_id=0), collate(ROWS, pad_token_id=EOS)
    assert torch.equal(same.labels, other.labels)
    assert torch.equal(same.attention_mask, other.attention_mask)
    assert same.input_ids.tolist() == [[1, 2, 3, 4], [5, EOS, EOS, EOS]]


def test_a_fixed_width() -> None:
    batch = collate(ROWS, pad_token_id=0, pad_to=6)
    assert batch.input_ids.shape == batch.labels.shape == (2, 6)
    assert batch.response_positions.tolist() == [1, 2, 3, 7]
    assert batch.response_labels.tolist() == [3, 4, EOS, 6]
    with pytest.raises(ValueError, match=r"pad_to=3 is shorter than the longest row \(4 input tokens\)"):
        collate(ROWS, pad_token_id=0, pad_to=3)


@pytest.mark.parametrize("prompt_tokens", [0, 3])
def test_a_row_without_prompt_or_response(prompt_tokens: int) -> None:
    with pytest.raises(
        ValueError, match=f"example c: {prompt_tokens} prompt tokens of 3; a row needs at least one prompt and one response"
    ):
        collate([EncodedExample("c", (1, 2, 3), prompt_tokens)], pad_token_id=0)


def test_moving_a_batch_keeps_everything() -> None:
    batch = collate(ROWS, pad_token_id=0)
    moved = batch.to(torch.device("cpu"))
    assert moved.example_ids == batch.example_ids and moved.response_counts == batch.response_counts
    for name in ("input_ids", "attention_mask", "labels", "response_positions"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
