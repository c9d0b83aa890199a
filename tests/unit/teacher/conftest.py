"""A tiny teacher, rows of several lengths and a capture with little to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.examples import EncodedExample
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import CaptureCounts, capture

Capture = Callable[..., CaptureCounts]


@pytest.fixture
def teacher() -> PreTrainedModel:
    return tiny.llama()


@pytest.fixture
def rows() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(3)
    return [
        EncodedExample(f"row-{i}", tuple(torch.randint(300, (6 + (5 * i) % 17,), generator=generator).tolist()), 2 + i % 3)
        for i in range(12)
    ]


@pytest.fixture
def make_key() -> Callable[..., CacheKey]:
    def make(layers: Sequence[int] = (0, 2, 4), **changes: Any) -> CacheKey:
        return CacheKey(
            **{
                "teacher": "t", "tokenizer": "k", "template": "alpaca/1", "dataset": "d", "dtype": "float32",
                "max_tokens": 64, "layers": tuple(layers), **changes,
            }
        )  # fmt: skip

    return make


@pytest.fixture
def take(teacher: PreTrainedModel, rows: list[EncodedExample]) -> Capture:
    """capture() of the tiny teacher; a shard is closed after every batch of four unless told otherwise."""

    def run(folder: Path, key: CacheKey, *, examples: Sequence[EncodedExample] = rows, **options: Any) -> CaptureCounts:
        folder.mkdir(exist_ok=True)
        settings = {"shard_bytes": 1, "batch_size": 4, "pad_token_id": 0, "device": torch.device("cpu"), **options}
        return capture(teacher, examples, key.layers, folder, key, **settings)

    return run


@pytest.fixture
def forwards(teacher: PreTrainedModel) -> list[int]:
    """Rows of each forward pass of the teacher's body."""
    counted: list[int] = []
    teacher.model.register_forward_pre_hook(lambda _, __, kwargs: counted.append(len(kwargs["input_ids"])), with_kwargs=True)
    return counted
