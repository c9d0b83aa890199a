"""Remembering that a finished experiment was delivered to its tracking store, so that nothing needs to start again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.artifacts import write_text_atomically
from pipeline.remote import without_secrets
from pipeline.stages.compare import ComparePlan

_FILE = "tracked.json"


def is_tracked(comparison: ComparePlan, run_dir: Path) -> bool:
    """Whether exactly this comparison is there, and was delivered to the store that is configured now."""
    if not comparison.finished():
        return False
    try:
        content = json.loads(_file(comparison, run_dir).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(content == _facts(comparison, run_dir))


def mark_tracked(comparison: ComparePlan, run_dir: Path) -> None:
    """Say that it was."""
    write_text_atomically(_file(comparison, run_dir), json.dumps(_facts(comparison, run_dir)))


def _file(comparison: ComparePlan, run_dir: Path) -> Path:
    return run_dir / comparison.experiment.name / _FILE


def _facts(comparison: ComparePlan, run_dir: Path) -> dict[str, str]:
    embedded = f"sqlite:///{run_dir.resolve() / 'mlflow.db'}"
    store = os.environ.get("MLFLOW_TRACKING_URI", embedded)
    return {"comparison": comparison.place.fingerprint, "store": without_secrets(store)}
