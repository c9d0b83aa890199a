"""How much disk a cache takes, told before any work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ArtifactError
from pipeline.teacher.cache.schema import STORAGE

_BYTES_PER_ROW = 32
"""Id, its offset, and the row's share of a record batch's metadata."""
_BYTES_PER_LIST = 16
"""Offset and padding of one row in one column, with its share of the column's metadata."""


def estimate_bytes(response_tokens: int, rows: int, layers: Sequence[int], width: int, dtype: str) -> int:
    """Bytes on disk of a cache, within 2 % where a row has at least a few kilobytes of states.

    Args:
        response_tokens: of all rows together.
        rows: examples.
        layers: cached layers.
        width: d_T, the teacher's hidden size.
        dtype: storage type.
    """
    storage = STORAGE[dtype]
    per_token = width * storage.bytes_per_value + (4 if storage.scaled else 0)
    lists = 2 if storage.scaled else 1
    per_row = _BYTES_PER_ROW + len(layers) * lists * _BYTES_PER_LIST
    return response_tokens * len(layers) * per_token + rows * per_row


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
