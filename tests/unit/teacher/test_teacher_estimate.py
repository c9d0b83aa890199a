from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError
from pipeline.models.lens import blocks
from pipeline.teacher.cache import estimate
from pipeline.teacher.cache.estimate import check_disk, estimate_bytes, estimate_seconds
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("width", "batch_size"), [(32, 1), (32, 8), (256, 8)])
def test_estimate_is_within_two_percent(
    tmp_path: Path, make_key: Callable[..., CacheKey], dtype: str, width: int, batch_size: int
) -> None:
    model = tiny.llama(layers=2, width=width)
    rows = [EncodedExample(f"{i:016x}", tuple(range(3, 43 + 2 * i)), 5) for i in range(24)]
    key = make_key(layers=(0, 1, 2), dtype=dtype)
    counts = capture(model, rows, key.layers, tmp_path, key, batch_size=batch_size, pad_token_id=0, device=torch.device("cpu"))
    estimate = estimate_bytes(counts.response_tokens, counts.rows, key.layers, width, dtype, batch_size=batch_size)
    assert estimate == pytest.approx(counts.bytes, rel=0.02)


def test_disk_is_checked_at_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10, 5, 5 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_disk(tmp_path / "not" / "yet", 5 * 2**30)
    assert asked == [tmp_path]
    with pytest.raises(
        ArtifactError, match=r"needs 5\.5 GiB, but only 5 GiB are free there; free some space.*cache.enabled: false"
    ):
        check_disk(tmp_path, 11 * 2**29)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.qwen2])
def test_the_time_is_that_of_one_block_times_the_layers_and_passes(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., PreTrainedModel]
) -> None:
    timed: list[tuple[int, tuple[int, ...]]] = []

    def half_a_second(model: PreTrainedModel, ids: torch.Tensor) -> float:
        timed.append((len(blocks(model)), tuple(ids.shape)))
        assert really(model, ids) > 0
        return 0.5

    really = estimate._forward_seconds
    monkeypatch.setattr(estimate, "_forward_seconds", half_a_second)
    seconds = estimate_seconds(make(layers=6).config, tokens=1000, rows=50, batch_size=5, device=torch.device("cpu"))
    assert set(timed) == {(1, (5, 20))}
    assert seconds == pytest.approx(6 * 10 * 0.5)


def test_fewer_rows_than_a_batch_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_forward_seconds", lambda model, ids: float(ids.numel()))
    seconds = estimate_seconds(tiny.llama(layers=3).config, tokens=30, rows=3, batch_size=8, device=torch.device("cpu"))
    assert seconds == pytest.approx(3 * 30.0)
