"""The order of training: complete, reproducible, random, and with little padding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import encode_training, read_examples
from transformers import AutoTokenizer

from pipeline.data.batching import epoch_batches, micro_batches, padding_fraction
from pipeline.data.sources import LocalSource

LENGTHS = np.random.default_rng(0).integers(20, 500, 1000).tolist()


@given(st.lists(st.integers(1, 512), max_size=300), st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 5))
def test_every_row_once_in_full_batches_and_one_short_last(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(type(row) is int for batch in batches for row in batch)
    assert batches == epoch_batches(np.array(lengths, dtype=np.int32), batch_size, seed, epoch)


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = [epoch_batches(LENGTHS, 8, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({json.dumps(order) for order in orders}) == 9


def test_the_order_knows_no_global_state_and_no_process() -> None:
    expected = epoch_batches(LENGTHS, 8, 5, 2)
    np.random.seed(1)
    torch.manual_seed(1)
    assert epoch_batches(LENGTHS, 8, 5, 2) == expected
    code = (
        f"import json; from pipeline.data.batching import epoch_batches; print(json.dumps(epoch_batches({LENGTHS}, 8, 5, 2)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("count", [16, 17, 48, 360, 1000])
def test_rows_meet_other_rows_in_each_epoch(count: int) -> None:
    full = count // 8
    together = [{frozenset(batch) for batch in epoch_batches(LENGTHS[:count], 8, 1, epoch)[:full]} for epoch in range(4)]
    for first in range(4):
        for second in range(first):
            assert len(together[first] & together[second]) <= len(together[first]) // 10


def test_lengths_do_not_rise_or_fall_over_an_epoch() -> None:
    means = np.array([np.mean([LENGTHS[row] for row in batch]) for batch in epoch_batches(LENGTHS, 8, 1, 0)])
    time = np.arange(len(means))
    assert abs(np.corrcoef(time, means)[0, 1]) < 0.3
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_the_short_batch_is_not_always_of_the_same_length() -> None:
    lengths = list(range(1, 101))
    shorts = [np.mean([lengths[row] for row in epoch_batches(lengths, 8, seed, 0)[-1]]) for seed in range(40)]
    assert len(epoch_batches(lengths, 8, 0, 0)[-1]) == 4
    assert min(shorts) < 30 and max(shorts) > 70 and 35 < np.mean(shorts) < 65


def test_padding_fraction_by_hand() -> None:
    assert padding_fraction([2, 4, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_fraction([5, 5], [[0, 1]]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_little_padding_on_real_rows(shared: Path, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    encoded, _ = encode_training(read_examples(LocalSource(shared / "data" / "dolly_dev.jsonl")), tokenizer, "alpaca")
    lengths = [len(row.input_ids) - 1 for row in encoded]
    for epoch in range(4):
        assert padding_fraction(lengths, epoch_batches(lengths, 8, seed, epoch)) <= 0.05
    # The official code pads every row to 512 tokens.
    assert 1 - sum(lengths) / (512 * len(lengths)) > 0.7


def test_buckets_pad_far_less_than_a_plain_shuffle() -> None:
    shuffled = micro_batches(np.random.default_rng(3).permutation(1000).tolist(), 8)
    assert padding_fraction(LENGTHS, epoch_batches(LENGTHS, 8, 3, 0)) < 0.2 * padding_fraction(LENGTHS, shuffled)


def test_micro_batches_are_consecutive_parts() -> None:
    assert micro_batches([5, 3, 9, 1, 4], 2) == [[5, 3], [9, 1], [4]]
    assert micro_batches([5, 3], 8) == [[5, 3]]
    assert micro_batches([], 2) == []


def test_sizes_below_one() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        epoch_batches([1, 2], 0, 0, 0)
    with pytest.raises(ValueError, match="micro_size=0 must be at least 1"):
        micro_batches([1, 2], 0)
