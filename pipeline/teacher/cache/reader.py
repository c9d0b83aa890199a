"""Reading a cache: shards are memory-mapped, a batch's rows are found by example id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.collate import Batch
from pipeline.errors import ArtifactError, CacheMismatchError
from pipeline.teacher.cache.schema import (
    STORAGE,
    CacheKey,
    Ledger,
    check_key,
    decode,
    layer_column,
    read_ledger,
    scale_column,
    verify_shard,
)


@dataclass(frozen=True)
class CachedSignal:
    """States of one batch at its response positions, as they lay on disk until a layer is asked for.

    Attributes:
        stored: layer → [N, d] in the storage type.
        scales: layer → [N] float32, for int8 only.
        positions: [N] the batch's response positions.
        device: where states are wanted.
    """

    stored: Mapping[int, Tensor]
    scales: Mapping[int, Tensor]
    positions: Tensor
    device: torch.device

    def states(self, layer: int, positions: Tensor) -> Tensor:
        """States [N, d], float32, after `layer` at response positions of the batch, all or some.

        Raises:
            CacheMismatchError: other positions are asked for.
            ValueError: the layer was not asked for when the signal was made.
        """
        if layer not in self.stored:
            raise ValueError(f"teacher layer {layer} is not in this signal; it was made for {sorted(self.stored)}")
        # The move comes first: narrow types cross to the device in a half or a quarter of the bytes.
        stored, scale = self.stored[layer].to(self.device), self.scales.get(layer)
        scale = None if scale is None else scale.to(self.device)
        rows = self._rows(positions)
        if rows is not None:
            stored, scale = stored[rows], None if scale is None else scale[rows]
        return decode(stored, scale)

    def _rows(self, positions: Tensor) -> Tensor | None:
        """Indices of `positions` among the stored ones; None where they are the stored ones."""
        if _same_positions(positions, self.positions):
            return None
        held = self.positions.to(positions.device)
        rows = torch.searchsorted(held, positions.contiguous()).clamp(max=max(len(held) - 1, 0))
        if len(held) == 0 or not torch.equal(held[rows], positions):
            raise CacheMismatchError(
                f"asked for {len(positions)} positions that are not all among the batch's {len(held)} response positions, and "
                "a teacher cache holds nothing else; set cache.enabled: false to run the teacher online"
            )
        return rows


class CachedTeacher:
    """A TeacherSource that reads a capture; the teacher's body is never loaded.

    Args:
        folder: a finished cache.
        expected: what the cache must have been made for; it may hold more layers.
        num_layers: L_T of the teacher whose head is used.
        device: where states are wanted.

    Raises:
        CacheMismatchError: the cache was made for something else; the message lists each difference.
        ArtifactError: it is unfinished or damaged (every shard's checksum is verified once per process).
    """

    def __init__(self, folder: Path, expected: CacheKey, *, num_layers: int, device: torch.device) -> None:
        ledger = _open_ledger(folder)
        check_key(ledger.key, expected, folder, more_layers=True)
        if ledger.num_layers != num_layers:
            raise CacheMismatchError(
                f"{folder}: num_layers: cache has {ledger.num_layers}, expected {num_layers}; capture one for this teacher"
            )
        _verify(folder, ledger)
        self._folder, self._ledger, self._device = folder, ledger, device
        self._rows = {
            name: (block, row)
            for shard in ledger.shards
            for block in _open_blocks(folder / shard.file)
            for row, name in enumerate(block.ids)
        }

    @property
    def num_layers(self) -> int:
        """L_T, the number of transformer layers."""
        return self._ledger.num_layers

    @property
    def reads_ahead(self) -> bool:
        """True: a signal is a copy out of the memory map."""
        return True

    @property
    def layers(self) -> tuple[int, ...]:
        """Cached layers, sorted."""
        return self._ledger.key.layers

    def __len__(self) -> int:
        return len(self._rows)

    def signal(self, batch: Batch, layers: Sequence[int]) -> CachedSignal:
        """Gather the batch's rows, in its order.

        Raises:
            CacheMismatchError: the cache lacks a layer or an example, or holds another number of response tokens for one.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise CacheMismatchError(
                f"{self._folder}: layers: cache has {list(self.layers)}, but {missing} are asked for; capture one with them"
            )
        places = self._find(batch)
        total = sum(batch.response_counts)
        storage, width = STORAGE[self._ledger.key.dtype], self._ledger.width
        stored: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        for layer in set(layers):
            words = _gather([block.values(layer, row) for block, row in places], np.empty((total, width), storage.words))
            stored[layer] = torch.from_numpy(words).view(storage.torch)
            if storage.scaled:
                factors = _gather([block.scales(layer, row) for block, row in places], np.empty(total, np.float32))
                scales[layer] = torch.from_numpy(factors)
        return CachedSignal(stored, scales, batch.response_positions, self._device)

    def row(self, example_id: str, layer: int) -> NDArray[np.generic]:
        """Stored words [n, d] of one example, a view of the memory-mapped shard.

        Raises:
            CacheMismatchError: the cache lacks the example.
        """
        if example_id not in self._rows:
            raise self._lacks([example_id])
        block, row = self._rows[example_id]
        return block.values(layer, row)

    def _find(self, batch: Batch) -> list[tuple[_Block, int]]:
        missing = [name for name in batch.example_ids if name not in self._rows]
        if missing:
            raise self._lacks(missing)
        places = [self._rows[name] for name in batch.example_ids]
        for name, count, (block, row) in zip(batch.example_ids, batch.response_counts, places, strict=True):
            held = block.tokens(row)
            if held != count:
                raise CacheMismatchError(
                    f"{self._folder}: example {name}: cache has {held} response tokens, expected {count}; "
                    "the rows were tokenised or truncated otherwise, so capture again"
                )
        return places

    def _lacks(self, names: Sequence[str]) -> CacheMismatchError:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        return CacheMismatchError(
            f"{self._folder}: {len(names)} examples are not in the teacher cache ({shown}); it holds {len(self._rows)} others: "
            "capture one for this dataset"
        )


@dataclass(frozen=True)
class _Block:
    """One record batch of a memory-mapped shard; arrays are views of the map."""

    batch: pa.RecordBatch
    ids: list[str]
    starts: NDArray[np.int64]
    views: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def tokens(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def values(self, layer: int, row: int) -> NDArray[np.generic]:
        return self._slice(layer_column(layer), row)

    def scales(self, layer: int, row: int) -> NDArray[np.generic]:
        return self._slice(scale_column(layer), row)

    def _slice(self, column: str, row: int) -> NDArray[np.generic]:
        if column not in self.views:
            self.views[column] = _column_view(self.batch.column(column).values)
        return self.views[column][self.starts[row] : self.starts[row + 1]]


def _column_view(elements: pa.Array) -> NDArray[np.generic]:
    """[tokens, d] of a vector column or [tokens] of a scalar one; an error, not a copy, where no view is possible."""
    if not pa.types.is_fixed_size_list(elements.type):
        scalars: NDArray[np.generic] = elements.to_numpy(zero_copy_only=True)
        return scalars
    flat: NDArray[np.generic] = elements.values.to_numpy(zero_copy_only=True)
    return flat.reshape(-1, elements.type.list_size)


def _open_blocks(path: Path) -> list[_Block]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [_block(reader.get_batch(index)) for index in range(reader.num_record_batches)]


def _block(batch: pa.RecordBatch) -> _Block:
    starts = np.concatenate([[0], np.cumsum(batch.column("n").to_numpy(), dtype=np.int64)])
    return _Block(batch, batch.column("id").to_pylist(), starts)


def _gather(rows: Sequence[NDArray[np.generic]], target: NDArray[np.generic]) -> NDArray[np.generic]:
    # Straight from the map into the batch: the only copy of a row between disk and compute.
    return np.concatenate(rows, out=target) if rows else target


def _open_ledger(folder: Path) -> Ledger:
    ledger = read_ledger(folder)
    if ledger is None:
        raise ArtifactError(f"{folder}: no teacher cache there; capture one first")
    if not ledger.finished or ledger.part != (0, 1):
        rows, (index, parts) = sum(shard.rows for shard in ledger.shards), ledger.part
        raise ArtifactError(
            f"{folder}: this teacher cache is unfinished or a part (part {index} of {parts}, {rows} rows in finished shards); "
            "run its capture again, it goes on where it stopped, and merge the parts"
        )
    return ledger


def _verify(folder: Path, ledger: Ledger) -> None:
    fix = f"remove {folder} and run again to rebuild it"
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda shard: verify_shard(folder, shard, fix), ledger.shards):
            pass


def _same_positions(asked: Tensor, held: Tensor) -> bool:
    return asked is held or (asked.shape == held.shape and torch.equal(asked.to(held.device), held))
