"""Exact resume: everything that the rest of a run depends on, in safetensors and JSON, swapped in atomically.

Weights and optimiser state are whole, however many processes share them: what N processes wrote, M can go on from.

Everything is on disk before it gets its name, and the last checkpoint goes only once the next one has it. state.json holds
a digest of each tensor file and of itself: a checkpoint that is damaged in any byte is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts import UNSEALED, file_digest, is_sealed, seal, sync, write_text_atomically
from pipeline.errors import ArtifactError
from pipeline.training.sharded import like, whole
from pipeline.training.step import Student
from pipeline.training.zero import ZeroOptimizer

_STATE, _MODEL, _PROJECTION, _OPTIMIZER, _RNG = (
    "state.json", "model.safetensors", "projection.safetensors", "optimizer.safetensors", "rng.safetensors",
)  # fmt: skip
Optimizer = torch.optim.Optimizer | ZeroOptimizer


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        tokens: real input tokens seen.
        seconds: training time so far, without validation.
        best_step: step of the best validation, None before the first.
        best_value: its value of the selection metric.
        due: whether the validation of `step` is still to be done: training was stopped before it.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    due: bool = False


def save(folder: Path, student: Student, optimizer: Optimizer, progress: Progress, writes: bool = True) -> None:
    """Write a checkpoint beside the last one and swap them; a kill at any moment leaves one that is whole.

    With several processes all must call it, to put sharded tensors together, and one `writes`.
    """
    weights = state_of(student.model)
    projection = {} if student.projection is None else state_of(student.projection)
    tensors, scalars = _optimizer_state(optimizer)
    if not writes:
        return
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(weights, fresh / _MODEL)
    if projection:
        save_file(projection, fresh / _PROJECTION)
    save_file(tensors, fresh / _OPTIMIZER)
    save_file(rng_state(), fresh / _RNG)
    digests = {file.name: file_digest(file) for file in sorted(fresh.iterdir())}
    for name in digests:
        sync(fresh / name)
    state = {"progress": asdict(progress), "optimizer": scalars, "files": digests, "sealed_by": UNSEALED}
    write_text_atomically(fresh / _STATE, seal(json.dumps(state).encode()).decode())
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # otherwise `old` is the only one: a kill between the renames left it there
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(fresh, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_weights(folder: Path, student: Student) -> None:
    """Restore the student, which no other process shares yet, from a checkpoint if there is one.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    with _reading(folder) as found:
        if found is None:
            return
        digests = _read_state(found)["files"]
        student.model.load_state_dict(_load(found / _MODEL, digests), strict=False)
        if student.projection is not None:
            student.projection.load_state_dict(_load(found / _PROJECTION, digests))


def load_state(folder: Path, optimizer: Optimizer) -> Progress | None:
    """Restore optimiser and random generators from a checkpoint; None if there is none.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    with _reading(folder) as found:
        if found is None:
            return None
        state = _read_state(found)
        _restore_optimizer(optimizer, _load(found / _OPTIMIZER, state["files"]), state["optimizer"])
        restore_rng(_load(found / _RNG, state["files"]))
        return Progress(**state["progress"])


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """State dict of whole tensors without the second name of tied parameters; see `save` for several processes."""
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    state = module.state_dict(keep_vars=True)
    return {name: whole(tensor).detach().contiguous() for name, tensor in state.items() if name in names}


def _read_state(found: Path) -> dict[str, Any]:
    content = (found / _STATE).read_bytes()
    if not is_sealed(content):
        raise ValueError(f"{_STATE}: its checksum differs")
    state: dict[str, Any] = json.loads(content)
    return state


def _load(file: Path, digests: dict[str, str]) -> dict[str, Tensor]:
    if file_digest(file) != digests[file.name]:
        raise ValueError(f"{file.name}: its checksum differs")
    return load_file(file)


@contextmanager
def _reading(folder: Path) -> Iterator[Path | None]:
    """The checkpoint to read, None if there is none.

    Raises:
        ArtifactError: reading it fails.
    """
    found = _surviving(folder)
    try:
        yield found if found.exists() else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{found}: damaged checkpoint ({error}); remove the folder to train from the start") from None


def _surviving(folder: Path) -> Path:
    # A kill between the two renames of `save` leaves the old checkpoint under its other name.
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():
        return old
    # A kill after them leaves both; nothing would remove the old one if that was the last checkpoint of the run.
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "index.name", and the scalars beside them."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = whole(value).contiguous()
            elif value is not None:
                scalars[f"{index}.{name}"] = value
    return tensors, scalars


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.load_state_dict({"state": state})
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state.items():
        values.update({name: like(value, parameters[number]) for name, value in values.items() if isinstance(value, Tensor)})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state() -> dict[str, Tensor]:
    """States of the random generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, Tensor]) -> None:
    """Set the random generators to what `rng_state` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
