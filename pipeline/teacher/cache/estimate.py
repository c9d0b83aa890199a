"""How much disk a cache takes, told before any work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ArtifactError
from pipeline.teacher.cache.schema import STORAGE

# Arrow IPC, per record batch: message and footer entry, 16 bytes per field node and per buffer, buffers padded to 8 bytes.
_ROW = 16 + 4 + 4
"""An id of 16 characters, its offset and the row's token count."""
_LIST = 8
"""Offset of one row in one list column."""
_RECORD_BATCH = 300
_VECTOR_COLUMN = (3 + 5) * 16 + 16
_SCALE_COLUMN = (2 + 4) * 16 + 16


def estimate_bytes(
    response_tokens: int, rows: int, layers: Sequence[int], width: int, dtype: str, *, batch_size: int = 8
) -> int:
    """Bytes on disk of a cache, within 2 %.

    Args:
        response_tokens: of all rows together.
        rows: examples.
        layers: cached layers.
        width: d_T, the teacher's hidden size.
        dtype: storage type.
        batch_size: rows of a record batch, that is of a teacher forward pass during capture.
    """
    storage = STORAGE[dtype]
    per_token = width * storage.bytes_per_value + (4 if storage.scaled else 0)
    per_row = _ROW + len(layers) * (2 if storage.scaled else 1) * _LIST
    per_batch = _RECORD_BATCH + len(layers) * (_VECTOR_COLUMN + (_SCALE_COLUMN if storage.scaled else 0))
    return response_tokens * len(layers) * per_token + rows * per_row + math.ceil(rows / batch_size) * per_batch


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Make sure that a folder's file system has room.

    Raises:
        ArtifactError: too little is free; tells both figures and what to do.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ArtifactError(
            f"{folder}: the teacher cache needs {_readable(needed_bytes)}, but only {_readable(free)} are free there; "
            "free some space, choose another run directory, store fewer bytes (cache.dtype: int8, fewer layers), "
            "or set cache.enabled: false to run the teacher online"
        )


def _readable(count: int) -> str:
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"
