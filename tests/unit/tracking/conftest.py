"""A store that is made once: making one takes seconds, copying it none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.mlflow_store import MLflowStore


@pytest.fixture(scope="session")
def database() -> Iterator[Path]:
    """An empty store, in memory where there is such a file system; tests copy it, or have their own experiments in it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "mlflow.db"
        MLflowStore(f"sqlite:///{path}", path.parent / "artifacts")
        yield path
