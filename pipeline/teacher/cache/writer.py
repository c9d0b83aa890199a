"""Capture: one forward pass of the teacher per batch, its states at response positions streamed to Arrow shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.artifacts import file_digest, sync
from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError, CacheMismatchError, DataError, ModelError
from pipeline.models.lens import blocks
from pipeline.teacher.cache.schema import (
    LEDGER,
    CacheKey,
    Ledger,
    ShardFacts,
    check_key,
    encode,
    read_ledger,
    shard_schema,
    verify_shard,
    write_ledger,
)
from pipeline.teacher.online import layer_states

log = logging.getLogger(__name__)
_UNFINISHED = ".writing"


@dataclass(frozen=True)
class CaptureCounts:
    """What a capture left in its folder.

    Attributes:
        rows: examples.
        response_tokens: of all rows.
        bytes: of all shards.
        shards: files.
        reused_rows: rows of shards that an earlier, interrupted capture had finished.
    """

    rows: int
    response_tokens: int
    bytes: int
    shards: int
    reused_rows: int


def capture(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    layers: Sequence[int],
    folder: Path,
    key: CacheKey,
    *,
    shard_bytes: int = 256 << 20,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> CaptureCounts:
    """Write the teacher's states of every example into `folder`; goes on after the shards that are finished there.

    Rows are ordered by length, longest first (a batch that does not fit memory fails at once), then by id, so the shards
    depend neither on the examples' order nor on interruptions: a capture in two goes writes the bytes of one.

    Args:
        model: the teacher, on `device`.
        examples: rows with ids of their own.
        layers: layers to store; those of `key`.
        folder: an existing folder that one process at a time writes.
        key: pinned in the ledger; its dtype is the storage type.
        shard_bytes: size at which a shard is closed.
        batch_size: rows of a forward pass.
        pad_token_id: any valid token id.
        device: where the model is.
        progress: told how many more rows are done (handed to the disk); reused rows count.
        part: (i, n) captures the i-th of n parts, chosen by a hash of the example id; see `merge_parts`.

    Raises:
        CacheMismatchError: the folder holds a capture under another key or another part.
        ArtifactError: the disk is full, a finished shard is damaged, or the states do not fit the storage type.
        DataError: two rows have the same id.
        ModelError: the teacher's states are not finite.
    """
    if tuple(sorted(set(layers))) != key.layers or not key.final_layer_normed:
        raise ValueError(f"layers {list(layers)} under the transformers convention, but the key says {key}")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part {part}: (i, n) with 0 <= i < n")
    planned = _ordered(examples, part)
    ledger = _resume(folder, Ledger(key, len(blocks(model)), model.config.hidden_size, part))
    done = {name for shard in ledger.shards for name in read_ids(folder / shard.file)}
    remaining = [example for example in planned if example.id not in done]
    report = progress or (lambda _: None)
    report(len(planned) - len(remaining))
    model.eval()
    with _ShardWriter(folder, ledger, shard_bytes) as writer:
        for start in range(0, len(remaining), batch_size):
            rows = remaining[start : start + batch_size]
            batch = collate(rows, pad_token_id)
            writer.add(_record_batch(batch, _states(model, batch.to(device), key), key, ledger.width))
            report(len(rows))
        shards = writer.finish()
    return CaptureCounts(
        rows=sum(shard.rows for shard in shards),
        response_tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=len(shards),
        reused_rows=len(planned) - len(remaining),
    )


def merge_parts(folders: Sequence[Path], target: Path) -> None:
    """Join the n parts of a capture into one cache at `target`; shards are linked, not rewritten.

    Raises:
        ArtifactError: a part is unfinished or missing, or a shard is damaged.
        CacheMismatchError: the parts were captured under different keys.
    """
    ledgers = [_finished(folder) for folder in folders]
    for folder, ledger in zip(folders, ledgers, strict=True):
        check_key(ledger.key, ledgers[0].key, folder, more_layers=False)
    found = sorted(ledger.part for ledger in ledgers)
    wanted = [(index, ledgers[0].part[1]) for index in range(ledgers[0].part[1])]
    if found != wanted:
        raise ArtifactError(f"{target}: merging needs the parts {wanted}, found {found}; capture what is missing")
    target.mkdir(parents=True, exist_ok=True)
    for folder, ledger in zip(folders, ledgers, strict=True):
        for shard in ledger.shards:
            verify_shard(folder, shard, f"remove {folder} and capture that part again")
            _link(folder / shard.file, target / shard.file)
    shards = tuple(shard for ledger in sorted(ledgers, key=lambda ledger: ledger.part) for shard in ledger.shards)
    write_ledger(target, replace(ledgers[0], part=(0, 1), shards=shards))


def read_ids(shard: Path) -> list[str]:
    """Example ids of a shard, in row order."""
    with pa.memory_map(str(shard)) as source, pa.ipc.open_file(source) as reader:
        return [name for index in range(reader.num_record_batches) for name in reader.get_batch(index).column("id").to_pylist()]


def _ordered(examples: Sequence[EncodedExample], part: tuple[int, int]) -> list[EncodedExample]:
    chosen = [example for example in examples if part[1] == 1 or _hash(example.id) % part[1] == part[0]]
    chosen.sort(key=lambda example: (-len(example.input_ids), example.id))
    seen: set[str] = set()
    for example in chosen:
        if example.id in seen:
            raise DataError(f"example id {example.id!r} occurs twice; a teacher cache is keyed by id: remove the duplicate row")
        seen.add(example.id)
    return chosen


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _resume(folder: Path, fresh: Ledger) -> Ledger:
    """The folder's ledger without the shards whose files are gone, or `fresh`; files that no ledger knows are removed."""
    ledger = read_ledger(folder)
    if ledger is None:
        ledger = fresh
    check_key(ledger.key, fresh.key, folder, more_layers=False)
    for name in ("part", "num_layers", "width"):
        held, wanted = getattr(ledger, name), getattr(fresh, name)
        if held != wanted:
            raise CacheMismatchError(f"{folder}: {name}: capture has {held}, expected {wanted}; use another folder")
    present = tuple(shard for shard in ledger.shards if (folder / shard.file).exists())
    for shard in present:
        verify_shard(folder, shard, "remove that file and run again: only its rows are captured anew")
    if len(present) < len(ledger.shards):
        log.warning("%s: %d shards are gone; their rows are captured anew", folder, len(ledger.shards) - len(present))
    known = {shard.file for shard in present}
    for file in folder.iterdir():
        stray_shard = file.suffix == ".arrow" and file.name not in known
        if stray_shard or file.suffix == _UNFINISHED or (file.name.startswith(f".{LEDGER}.") and file.suffix == ".tmp"):
            file.unlink()
    return replace(ledger, shards=present, finished=False)


def _finished(folder: Path) -> Ledger:
    ledger = read_ledger(folder)
    if ledger is None or not ledger.finished:
        raise ArtifactError(f"{folder}: no finished capture there; run that part's capture again, it goes on where it stopped")
    return ledger


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP):
            raise
        shutil.copy2(source, target)  # another file system, or one without hard links


def _states(model: PreTrainedModel, batch: Batch, key: CacheKey) -> dict[int, Tensor]:
    try:
        return layer_states(model, batch, key.layers, batch.response_positions)
    except torch.OutOfMemoryError as error:
        rows, width = batch.input_ids.shape
        message = f"no memory for a teacher batch of {rows} rows × {width} tokens; set cache.batch_size lower"
        raise ModelError(message) from error


def _record_batch(batch: Batch, states: Mapping[int, Tensor], key: CacheKey, width: int) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum(batch.response_counts)]).astype(np.int64)
    columns: list[pa.Array] = [pa.array(batch.example_ids), pa.array(batch.response_counts, pa.int32())]
    for layer in key.layers:
        try:
            words, scale = encode(states[layer], key.dtype)
        except OverflowError as error:
            raise _does_not_fit(layer, str(error), batch, key.dtype) from None
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(words.reshape(-1)), width)
        columns.append(pa.LargeListArray.from_arrays(offsets, vectors))
        if scale is not None:
            columns.append(pa.LargeListArray.from_arrays(offsets, pa.array(scale)))
    return pa.RecordBatch.from_arrays(columns, schema=shard_schema(key.layers, width, key.dtype))


def _does_not_fit(layer: int, magnitude: str, batch: Batch, dtype: str) -> ArtifactError | ModelError:
    rows = ", ".join(batch.example_ids[:3]) + (", …" if len(batch.example_ids) > 3 else "")
    if magnitude in ("nan", "inf"):
        return ModelError(f"teacher layer {layer}: states are not finite (rows {rows}); load the teacher in float32")
    return ArtifactError(
        f"teacher layer {layer}: a state of magnitude {magnitude} does not fit {dtype} (rows {rows}); set cache.dtype: bfloat16"
    )


class _ShardWriter:
    """Writes record batches on one thread beside the forward pass; closes, checks and lists a shard once it is full.

    A shard that is open when an exception leaves the block is thrown away.
    """

    def __init__(self, folder: Path, ledger: Ledger, shard_bytes: int) -> None:
        self._folder, self._ledger, self._shard_bytes = folder, ledger, shard_bytes
        self._schema = shard_schema(ledger.key.layers, ledger.width, ledger.key.dtype)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._pending: Future[None] | None = None
        self._open: _OpenShard | None = None

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if self._open is not None:
            self._open.discard()

    def add(self, rows: pa.RecordBatch) -> None:
        """Hand rows to the thread; at most one record batch waits. Raises what the batch before met."""
        self._wait()
        self._pending = self._thread.submit(self._write, rows)

    def finish(self) -> tuple[ShardFacts, ...]:
        """Close the last shard, mark the ledger finished and return its shards."""
        self._wait()
        if self._open is not None:
            self._thread.submit(self._close).result()
        self._ledger = replace(self._ledger, finished=True)
        write_ledger(self._folder, self._ledger)
        return self._ledger.shards

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write(self, rows: pa.RecordBatch) -> None:
        with _disk_errors(self._folder):
            if self._open is None:
                self._open = _OpenShard(self._folder / self._next_name(), self._schema)
            self._open.write(rows)
            if self._open.size >= self._shard_bytes:
                self._close()

    def _close(self) -> None:
        assert self._open is not None
        with _disk_errors(self._folder):
            facts, self._open = self._open.close(), None
            # In the order of their names, so that a shard that was captured anew leaves no trace.
            shards = sorted((*self._ledger.shards, facts), key=lambda shard: shard.file)
            self._ledger = replace(self._ledger, shards=tuple(shards))
            write_ledger(self._folder, self._ledger)

    def _next_name(self) -> str:
        # Named by part, so that merged parts never collide.
        index, parts = self._ledger.part
        taken = {shard.file for shard in self._ledger.shards}
        names = (f"part-{index:03d}-of-{parts:03d}-shard-{number:05d}.arrow" for number in range(len(taken) + 1))
        return next(name for name in names if name not in taken)


class _OpenShard:
    """One shard under construction, beside its final name."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._partial = path, path.with_name(path.name + _UNFINISHED)
        self._stream: BinaryIO = self._partial.open("wb")
        self._writer = pa.ipc.new_file(self._stream, schema)
        self._rows = self._tokens = 0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._stream.tell()

    def write(self, rows: pa.RecordBatch) -> None:
        self._writer.write_batch(rows)
        self._rows += rows.num_rows
        self._tokens += int(np.sum(rows.column("n").to_numpy(), dtype=np.int64))

    def close(self) -> ShardFacts:
        """Make it durable under its final name."""
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        facts = ShardFacts(self._path.name, self._rows, self._tokens, self._partial.stat().st_size, file_digest(self._partial))
        os.replace(self._partial, self._path)
        sync(self._path.parent)
        return facts

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # the error that ends the capture is the one to report
            self._stream.close()
        self._partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot write the teacher cache ({error.strerror or error}); finished shards are kept: "
            "make room and run again to go on from them"
        ) from error
