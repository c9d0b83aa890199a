"""Remembering that a finished experiment was delivered to its tracking store, so that nothing needs to start again."""

from __future__ import annotations

import json
import os

from pipeline.artifacts import write_text_atomically
from pipeline.plan import Plan

_FILE = "tracked.json"


def is_tracked(plan: Plan) -> bool:
    """Whether exactly this comparison was delivered to the store that is configured now."""
    path = plan.run_dir / plan.experiment.name / _FILE
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == _facts(plan))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def mark_tracked(plan: Plan) -> None:
    """Say that it was."""
    write_text_atomically(plan.run_dir / plan.experiment.name / _FILE, json.dumps(_facts(plan)))


def _facts(plan: Plan) -> dict[str, str]:
    embedded = f"sqlite:///{plan.run_dir.resolve() / 'mlflow.db'}"
    return {"comparison": plan.comparison.place.fingerprint, "store": os.environ.get("MLFLOW_TRACKING_URI", embedded)}
