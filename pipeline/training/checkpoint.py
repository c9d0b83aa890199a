"""Exact resume: everything that the rest of a run depends on, in safetensors and JSON, swapped in atomically."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts import write_text_atomically
from pipeline.errors import ArtifactError
from pipeline.training.step import Student

_STATE, _MODEL, _PROJECTION, _OPTIMIZER, _RNG = (
    "state.json", "model.safetensors", "projection.safetensors", "optimizer.safetensors", "rng.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        tokens: real input tokens seen.
        seconds: training time so far, without validation.
        best_step: step of the best validation, None before the first.
        best_value: its value of the selection metric.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None


def save(folder: Path, student: Student, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint beside the last one and swap them; a kill at any moment leaves one that is whole."""
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(_weights(student.model), fresh / _MODEL)
    if student.projection is not None:
        save_file(dict(student.projection.state_dict()), fresh / _PROJECTION)
    tensors, scalars = _optimizer_state(optimizer)
    save_file(tensors, fresh / _OPTIMIZER)
    save_file(_rng_state(), fresh / _RNG)
    write_text_atomically(fresh / _STATE, json.dumps({"progress": asdict(progress), "optimizer": scalars}))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, student: Student, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore a checkpoint into student, optimiser and random generators; None if there is none.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    folder = _surviving(folder)
    if not folder.exists():
        return None
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        student.model.load_state_dict(load_file(folder / _MODEL), strict=False)
        if student.projection is not None:
            student.projection.load_state_dict(load_file(folder / _PROJECTION))
        _restore_optimizer(optimizer, load_file(folder / _OPTIMIZER), state["optimizer"])
        _restore_rng(load_file(folder / _RNG))
        return Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: damaged checkpoint ({error}); remove the folder to train from the start") from None


def _surviving(folder: Path) -> Path:
    # A kill between the two renames of `save` leaves the old checkpoint under its other name.
    old = folder.with_name(folder.name + ".old")
    return old if not folder.exists() and old.exists() else folder


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """State dict without the second name of tied parameters."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.contiguous()
    return weights


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "index.name", and the scalars beside them."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            elif value is not None:
                scalars[f"{index}.{name}"] = value
    return tensors, scalars


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _rng_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
