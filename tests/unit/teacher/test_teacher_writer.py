from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError, CacheMismatchError, DataError, ModelError
from pipeline.teacher.cache import writer
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import LEDGER, CacheKey, read_ledger
from pipeline.teacher.cache.writer import CaptureCounts, capture, merge_parts, read_ids

MakeKey = Callable[..., CacheKey]
Take = Callable[..., CaptureCounts]
CPU = torch.device("cpu")


class Killed(Exception):
    """Stands for a kill in the middle of a capture."""


def kill_after_shards(folder: Path, count: int) -> Callable[[int], None]:
    def progress(_: int) -> None:
        ledger = read_ledger(folder)
        if ledger is not None and len(ledger.shards) >= count:
            raise Killed

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def open_cache(folder: Path, key: CacheKey) -> CachedTeacher:
    return CachedTeacher(folder, key, num_layers=4, device=CPU)


def test_counts_and_ledger_say_what_was_written(
    tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample]
) -> None:
    told: list[int] = []
    counts = take(tmp_path, make_key(), progress=told.append)
    ledger = read_ledger(tmp_path)
    assert ledger is not None and ledger.finished and (ledger.num_layers, ledger.width) == (4, 32)
    tokens = sum(len(row.input_ids) - row.prompt_tokens for row in rows)
    files = list(tmp_path.glob("*.arrow"))
    assert counts == CaptureCounts(12, tokens, sum(file.stat().st_size for file in files), 3, 0)
    assert told == [0, 4, 4, 4]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([LEDGER, *(shard.file for shard in ledger.shards)])


def test_a_shard_is_closed_at_its_size(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    assert take(tmp_path / "large", make_key(), shard_bytes=1 << 30).shards == 1
    assert take(tmp_path / "small", make_key(), shard_bytes=1, batch_size=1).shards == 12


def test_rows_lie_longest_first_whatever_the_order(
    tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample]
) -> None:
    take(tmp_path / "one", make_key(), shard_bytes=1 << 30)
    take(tmp_path / "other", make_key(), shard_bytes=1 << 30, examples=rows[::-1])
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    lengths = {row.id: len(row.input_ids) for row in rows}
    found = [lengths[name] for name in read_ids(next((tmp_path / "one").glob("*.arrow")))]
    assert found == sorted(lengths.values(), reverse=True)


def test_a_row_does_not_depend_on_its_batch(tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample]) -> None:
    take(tmp_path / "ones", make_key(), batch_size=1)
    take(tmp_path / "fives", make_key(), batch_size=5)
    ones, fives = (open_cache(tmp_path / name, make_key()) for name in ("ones", "fives"))
    for row in rows:
        for layer in (0, 2, 4):
            torch.testing.assert_close(
                torch.tensor(ones.row(row.id, layer)), torch.tensor(fives.row(row.id, layer)), rtol=1e-5, atol=1e-5
            )


def test_shards_are_plain_arrow(tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample]) -> None:
    take(tmp_path, make_key(dtype="float16"), shard_bytes=1 << 30)
    table = pa.ipc.open_file(next(tmp_path.glob("*.arrow"))).read_all().to_pydict()
    place = table["id"].index(rows[5].id)
    count = len(rows[5].input_ids) - rows[5].prompt_tokens
    assert table["n"][place] == count
    assert [len(vector) for vector in table["layer_2"][place]] == [32] * count


@pytest.mark.parametrize("shards_before", [1, 2])
def test_capture_goes_on_after_the_finished_shards(
    tmp_path: Path, take: Take, make_key: MakeKey, forwards: list[int], shards_before: int
) -> None:
    whole, folder, key = tmp_path / "whole", tmp_path / "killed", make_key()
    take(whole, key, batch_size=2, shard_bytes=1)
    assert forwards == [2] * 6
    with pytest.raises(Killed):
        take(folder, key, batch_size=2, shard_bytes=1, progress=kill_after_shards(folder, shards_before))
    kept = {name: data for name, data in contents(folder).items() if name.endswith(".arrow")}
    assert len(kept) >= shards_before
    forwards.clear()
    told: list[int] = []
    counts = take(folder, key, batch_size=2, shard_bytes=1, progress=told.append)
    assert counts.reused_rows == 2 * len(kept) == told[0]
    assert sum(forwards) == 12 - counts.reused_rows
    assert kept.items() <= contents(folder).items()
    assert contents(folder) == contents(whole)


def test_a_kill_loses_the_open_shard_only(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    with pytest.raises(Killed):
        take(tmp_path, make_key(), shard_bytes=1, progress=kill_after_shards(tmp_path, 2))
    assert all(file.suffix != ".writing" for file in tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="unfinished"):
        open_cache(tmp_path, make_key())


def test_leftovers_of_a_hard_kill_are_removed(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    for name in ("part-000-of-001-shard-00000.arrow", "part-000-of-001-shard-00001.arrow.writing", f".{LEDGER}.17.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    take(tmp_path, make_key(), shard_bytes=1 << 30)
    assert sorted(file.name for file in tmp_path.iterdir()) == [LEDGER, "notes.txt", "part-000-of-001-shard-00000.arrow"]
    assert len(open_cache(tmp_path, make_key())) == 12


def test_a_finished_capture_is_not_repeated(tmp_path: Path, take: Take, make_key: MakeKey, forwards: list[int]) -> None:
    first = take(tmp_path, make_key())
    before = contents(tmp_path)
    forwards.clear()
    again = take(tmp_path, make_key())
    assert forwards == [] and contents(tmp_path) == before
    assert (again.rows, again.bytes, again.reused_rows) == (first.rows, first.bytes, 12)


def test_a_removed_shard_is_captured_anew(tmp_path: Path, take: Take, make_key: MakeKey, forwards: list[int]) -> None:
    take(tmp_path, make_key())
    before = contents(tmp_path)
    victim = sorted(tmp_path.glob("*.arrow"))[1]
    victim.unlink()
    forwards.clear()
    take(tmp_path, make_key())
    assert forwards == [4]
    assert victim.read_bytes() == before[victim.name]
    assert len(open_cache(tmp_path, make_key())) == 12


def test_going_on_from_a_damaged_shard_is_refused(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    take(tmp_path, make_key())
    victim = sorted(tmp_path.glob("*.arrow"))[1]
    victim.write_bytes(victim.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=f"{victim.name}: .* bytes, its ledger says .*; remove that file and run again"):
        take(tmp_path, make_key())


@pytest.mark.parametrize("change", [{"teacher": "other"}, {"dtype": "int8"}, {"layers": (0, 2)}, {"layers": (0, 1, 2, 4)}])
def test_going_on_under_another_key_is_refused(tmp_path: Path, take: Take, make_key: MakeKey, change: dict[str, Any]) -> None:
    take(tmp_path, make_key())
    before = contents(tmp_path)
    with pytest.raises(CacheMismatchError, match=f"{next(iter(change))}: cache has"):
        take(tmp_path, make_key(**change))
    assert contents(tmp_path) == before


def test_going_on_with_another_part_is_refused(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    take(tmp_path, make_key(), part=(0, 2))
    with pytest.raises(CacheMismatchError, match=r"part: capture has \(0, 2\), expected \(1, 2\)"):
        take(tmp_path, make_key(), part=(1, 2))


def test_parts_merge_to_one_capture(tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample]) -> None:
    key = make_key()
    take(tmp_path / "whole", key)
    counts = [take(tmp_path / f"part{i}", key, part=(i, 3)) for i in range(3)]
    assert sum(count.rows for count in counts) == 12 and sum(count.rows > 0 for count in counts) > 1
    merge_parts([tmp_path / f"part{i}" for i in (2, 0, 1)], tmp_path / "merged")
    whole, merged = open_cache(tmp_path / "whole", key), open_cache(tmp_path / "merged", key)
    assert len(merged) == 12
    for row in rows:
        torch.testing.assert_close(
            torch.tensor(merged.row(row.id, 2)), torch.tensor(whole.row(row.id, 2)), rtol=1e-5, atol=1e-5
        )
    linked = next((tmp_path / "part0").glob("*.arrow"))
    assert (tmp_path / "merged" / linked.name).samefile(linked)


def test_parts_are_copied_across_file_systems(
    tmp_path: Path, take: Take, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        take(tmp_path / f"part{i}", make_key(), part=(i, 2))

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    merge_parts([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged")
    monkeypatch.undo()
    assert len(open_cache(tmp_path / "merged", make_key())) == 12


def test_merging_needs_every_part_once_finished_and_alike(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    one, two, other, target = (tmp_path / name for name in ("one", "two", "other", "target"))
    take(one, make_key(), part=(0, 2))
    with pytest.raises(ArtifactError, match=r"needs the parts \[\(0, 2\), \(1, 2\)\], found \[\(0, 2\)\]"):
        merge_parts([one], target)
    with pytest.raises(ArtifactError, match=r"found \[\(0, 2\), \(0, 2\)\]"):
        merge_parts([one, one], target)
    two.mkdir()
    with pytest.raises(ArtifactError, match=f"{two}: no finished capture there"):
        merge_parts([one, two], target)
    take(other, make_key(dataset="D"), part=(1, 2))
    with pytest.raises(CacheMismatchError, match="dataset: cache has D, expected d"):
        merge_parts([one, other], target)
    take(two, make_key(), part=(1, 2))
    victim = next(two.glob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ArtifactError, match=f"{victim.name}: the shard's checksum differs .*; remove {two} and capture"):
        merge_parts([one, two], target)
    assert not (target / LEDGER).exists()


def test_a_part_out_of_range_is_refused(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    with pytest.raises(ValueError, match=r"part \(2, 2\)"):
        take(tmp_path, make_key(), part=(2, 2))


def test_duplicate_ids_are_refused(tmp_path: Path, take: Take, make_key: MakeKey, rows: list[EncodedExample]) -> None:
    with pytest.raises(DataError, match="'row-1' occurs twice"):
        take(tmp_path, make_key(), examples=[*rows, rows[1]])


def test_layers_other_than_the_key_says_are_refused(
    tmp_path: Path, teacher: PreTrainedModel, rows: list[EncodedExample], make_key: MakeKey
) -> None:
    for layers, key in (([1], make_key()), ([0, 2, 4], make_key(final_layer_normed=False))):
        with pytest.raises(ValueError, match="but the key says"):
            capture(teacher, rows, layers, tmp_path, key, batch_size=4, pad_token_id=0, device=CPU)


def test_a_full_disk_is_told_and_capture_can_go_on(
    tmp_path: Path, take: Take, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = writer._OpenShard.write, []

    def fill(shard: Any, rows: pa.RecordBatch) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(rows.num_rows)
        write(shard, rows)

    monkeypatch.setattr(writer._OpenShard, "write", fill)
    with pytest.raises(ArtifactError, match=r"cannot write the teacher cache \(No space left on device\).*run again"):
        take(tmp_path, make_key())
    monkeypatch.undo()
    assert take(tmp_path, make_key()).reused_rows == 8


def test_states_beyond_float16_are_refused_with_a_way_out(
    tmp_path: Path, take: Take, make_key: MakeKey, teacher: PreTrainedModel
) -> None:
    teacher.model.embed_tokens.weight.data[:, 0] = 1e5
    with pytest.raises(
        ArtifactError, match=r"layer 0: a state of magnitude 1e\+05 does not fit float16 .*cache.dtype: bfloat16"
    ):
        take(tmp_path, make_key(dtype="float16"))


def test_a_teacher_that_is_not_finite_is_refused(
    tmp_path: Path, take: Take, make_key: MakeKey, teacher: PreTrainedModel
) -> None:
    teacher.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="layer 4: states are not finite"):
        take(tmp_path, make_key())


def test_too_little_memory_is_told(tmp_path: Path, take: Take, make_key: MakeKey, teacher: PreTrainedModel) -> None:
    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError

    teacher.model.register_forward_pre_hook(exhaust)
    with pytest.raises(ModelError, match=r"batch of 4 rows × \d+ tokens; set cache.batch_size lower"):
        take(tmp_path, make_key())


def test_no_rows_make_an_empty_cache(tmp_path: Path, take: Take, make_key: MakeKey) -> None:
    assert take(tmp_path, make_key(), examples=[]) == CaptureCounts(0, 0, 0, 0, 0)
    assert len(open_cache(tmp_path, make_key())) == 0


def test_dropout_is_off_during_capture(tmp_path: Path, rows: list[EncodedExample], make_key: MakeKey) -> None:
    import tiny

    model = tiny.gpt2(dropout=0.5).train()
    capture(model, rows, (4,), tmp_path, make_key(layers=(4,)), batch_size=1, pad_token_id=0, device=CPU)
    batch = collate(rows[:1], 0)
    with torch.no_grad():
        expected = model.eval().transformer(batch.input_ids).last_hidden_state[0][batch.response_positions]
    torch.testing.assert_close(torch.tensor(open_cache(tmp_path, make_key(layers=(4,))).row(rows[0].id, 4)), expected)
