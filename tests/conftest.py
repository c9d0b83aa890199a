"""Fixtures that every test directory shares."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent

# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that; tests of Ctrl-C need the default.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with goldens, real rows and tokenizers; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("DISTILLLENS_SHARED", PROJECT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no shared data at {folder} (set DISTILLLENS_SHARED)")
    return folder


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: migrating one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # commands that a test before this one ran in this process switch it on
