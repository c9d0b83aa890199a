from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError
from pipeline.teacher.cache.estimate import check_disk, estimate_bytes
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
