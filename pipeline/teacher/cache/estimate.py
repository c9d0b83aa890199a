"""How much disk a cache takes, told before any work."""

from __future__ import annotations

import copy
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

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
_TIMED_PASSES = 5


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


def estimate_seconds(teacher: PretrainedConfig, tokens: int, rows: int, batch_size: int, device: torch.device) -> float:
    """Seconds that a capture takes: one block of the teacher's shape with random weights is timed on a batch of mean length.

    Args:
        teacher: the teacher's configuration.
        tokens: input tokens of all rows.
        rows: examples.
        batch_size: rows of a teacher forward pass.
        device: where the capture will run.
    """
    config = copy.deepcopy(teacher)
    layers = int(config.num_hidden_layers)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device(device):
        block = AutoModel.from_config(config, dtype=torch.float32).eval()
    ids = torch.zeros(min(batch_size, rows), max(1, round(tokens / rows)), dtype=torch.long, device=device)
    passes = tokens / ids.numel()
    return layers * passes * statistics.median(_forward_seconds(block, ids) for _ in range(_TIMED_PASSES))


def _forward_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - started


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
