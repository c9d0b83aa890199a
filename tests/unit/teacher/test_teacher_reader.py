from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError, CacheMismatchError
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import CaptureCounts
from pipeline.teacher.online import OnlineTeacher

MakeKey = Callable[..., CacheKey]
Take = Callable[..., CaptureCounts]
CPU = torch.device("cpu")


def open_cache(folder: Path, key: CacheKey) -> CachedTeacher:
    return CachedTeacher(folder, key, num_layers=4, device=CPU)


@pytest.fixture
def folder(tmp_path: Path, take: Take, make_key: MakeKey) -> Path:
    take(tmp_path / "cache", make_key())
    return tmp_path / "cache"


@pytest.fixture
def cached(folder: Path, make_key: MakeKey) -> CachedTeacher:
    return open_cache(folder, make_key())


def memory_owner(array: np.ndarray) -> Any:
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_rows_are_views_of_the_map(
    tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample], dtype: str
) -> None:
    take(tmp_path, make_key(dtype=dtype))
    teacher = open_cache(tmp_path, make_key(dtype=dtype))
    first, again = teacher.row(rows[0].id, 2), teacher.row(rows[0].id, 2)
    assert not first.flags.owndata and not first.flags.writeable
    assert not isinstance(memory_owner(first), np.ndarray)
    assert np.shares_memory(first, again)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    address = first.__array_interface__["data"][0]
    assert any(low <= address < high for low, high in ranges)


def test_rows_come_in_the_batch_order_across_shards(
    cached: CachedTeacher, teacher: PreTrainedModel, rows: list[EncodedExample]
) -> None:
    batch = collate([rows[i] for i in (7, 0, 11, 3, 5)], 0)
    online = OnlineTeacher(teacher).signal(batch, [0, 2, 4])
    signal = cached.signal(batch, [4, 0, 2])
    for layer in (0, 2, 4):
        found = signal.states(layer, batch.response_positions)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, online.states(layer, batch.response_positions), rtol=1e-5, atol=1e-5)


def test_bounds_of_every_dtype_hold_through_the_files(
    tmp_path: Path, take: Take, make_key: MakeKey, cached: CachedTeacher, rows: list[EncodedExample]
) -> None:
    batch = collate(rows, 0)
    exact = cached.signal(batch, [2]).states(2, batch.response_positions)
    bounds = {"bfloat16": 2**-8 * exact.abs(), "float16": 2**-11 * exact.abs() + 2**-25}
    bounds["int8"] = 0.5001 / 127 * exact.abs().amax(dim=1, keepdim=True)
    for dtype, bound in bounds.items():
        take(tmp_path / dtype, make_key(dtype=dtype))
        found = open_cache(tmp_path / dtype, make_key(dtype=dtype)).signal(batch, [2]).states(2, batch.response_positions)
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= bound).all(), dtype
        assert not torch.equal(found, exact), dtype


def test_response_positions_serve_and_others_do_not(cached: CachedTeacher, rows: list[EncodedExample]) -> None:
    batch = collate(rows[:3], 0)
    signal = cached.signal(batch, [2])
    assert torch.equal(signal.states(2, batch.response_positions.clone()), signal.states(2, batch.response_positions))
    held = signal.states(2, batch.response_positions)
    assert torch.equal(signal.states(2, batch.response_positions[1::2]), held[1::2])
    assert torch.equal(signal.states(2, batch.response_positions.flip(0)), held.flip(0))
    for positions in (torch.arange(batch.input_ids.numel()), batch.response_positions[:1] - 1, batch.response_positions + 1):
        with pytest.raises(CacheMismatchError, match="holds nothing else; set cache.enabled: false to run the teacher online"):
            signal.states(2, positions)


def test_more_layers_than_expected_serve(folder: Path, make_key: MakeKey, rows: list[EncodedExample]) -> None:
    teacher = open_cache(folder, make_key(layers=(2,)))
    batch = collate(rows[:2], 0)
    assert teacher.layers == (0, 2, 4)
    assert teacher.signal(batch, [2]).states(2, batch.response_positions).shape == (sum(batch.response_counts), 32)


def test_a_missing_layer_is_refused(folder: Path, cached: CachedTeacher, make_key: MakeKey, rows: list[EncodedExample]) -> None:
    with pytest.raises(CacheMismatchError, match=r"layers: cache has \(0, 2, 4\), expected \(1, 2\)"):
        open_cache(folder, make_key(layers=(1, 2)))
    with pytest.raises(CacheMismatchError, match=r"layers: cache has \[0, 2, 4\], but \[1, 3\] are asked for"):
        cached.signal(collate(rows[:1], 0), [1, 2, 3])
    with pytest.raises(ValueError, match=r"layer 4 is not in this signal; it was made for \[2\]"):
        batch = collate(rows[:1], 0)
        cached.signal(batch, [2]).states(4, batch.response_positions)


def test_another_key_is_refused(folder: Path, make_key: MakeKey) -> None:
    with pytest.raises(CacheMismatchError, match="template: cache has alpaca/1, expected alpaca/2"):
        open_cache(folder, make_key(template="alpaca/2"))


def test_another_depth_is_refused(folder: Path, make_key: MakeKey) -> None:
    with pytest.raises(CacheMismatchError, match="num_layers: cache has 4, expected 6"):
        CachedTeacher(folder, make_key(), num_layers=6, device=CPU)


def test_examples_that_are_not_there_are_named(cached: CachedTeacher, rows: list[EncodedExample]) -> None:
    strangers = [replace(rows[i], id=f"stranger-{i}") for i in range(4)]
    with pytest.raises(
        CacheMismatchError, match=r"4 examples are not .* \(stranger-0, stranger-1, stranger-2, …\); it holds 12"
    ):
        cached.signal(collate([rows[0], *strangers], 0), [2])
    with pytest.raises(CacheMismatchError, match="1 examples are not in the teacher cache"):
        cached.row("stranger", 2)


def test_another_truncation_is_refused(cached: CachedTeacher, rows: list[EncodedExample]) -> None:
    shorter = replace(rows[2], input_ids=rows[2].input_ids[:-1])
    held = len(rows[2].input_ids) - rows[2].prompt_tokens
    with pytest.raises(CacheMismatchError, match=f"example row-2: cache has {held} response tokens, expected {held - 1}"):
        cached.signal(collate([rows[0], shorter], 0), [2])


def test_no_cache_is_told(tmp_path: Path, make_key: MakeKey) -> None:
    with pytest.raises(ArtifactError, match="no teacher cache there; capture one first"):
        open_cache(tmp_path, make_key())


def test_a_part_does_not_pass_for_the_whole(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    take(tmp_path, make_key(), part=(1, 2))
    with pytest.raises(ArtifactError, match="part 1 of 2"):
        open_cache(tmp_path, make_key())


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(("damage", "symptom"), [(truncate, "bytes, its ledger says"), (flip_a_bit, "checksum differs")])
def test_damage_is_found_and_named(folder: Path, make_key: MakeKey, damage: Callable[[bytes], bytes], symptom: str) -> None:
    open_cache(folder, make_key())  # a file that was verified and changes later is verified again
    victim = sorted(folder.glob("*.arrow"))[1]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(ArtifactError, match=f"{victim.name}: .*{symptom}.*; remove {folder} and run again to rebuild it"):
        open_cache(folder, make_key())


def test_a_lost_shard_is_named(folder: Path, make_key: MakeKey) -> None:
    victim = sorted(folder.glob("*.arrow"))[1]
    victim.unlink()
    with pytest.raises(ArtifactError, match=f"{victim.name}: the shard is missing"):
        open_cache(folder, make_key())


def test_checksums_are_computed_once(folder: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.teacher.cache import schema

    read: list[Path] = []
    digest = schema.file_digest
    monkeypatch.setattr(schema, "file_digest", lambda path: read.append(path) or digest(path))
    open_cache(folder, make_key())
    open_cache(folder, make_key())
    assert sorted(read) == sorted(path.resolve() for path in folder.glob("*.arrow"))


def batches_of(rows: Sequence[EncodedExample]) -> list[Batch]:
    return [collate(rows[i : i + 3], 0) for i in range(0, len(rows), 3)]
