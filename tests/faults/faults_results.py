"""What two runs of the same experiment must have in common: everything but times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

_TIMES = {"time", "seconds", "tokens_per_second", "train/tokens_per_second", "peak_memory_gib", "created", "sealed_by"}
# How much of the cache an earlier, interrupted capture had finished.
_HISTORY = {"reused_rows"}
# Somebody may be at work in the checkout while the tests run.
_CODE = {"git commit"}
# They show how long training took.
_TIMED_FILES = {"report.html", "cost.png", "cost.svg"}


def results(run_dir: Path) -> dict[str, Any]:
    """Relative path → content without times, of every file."""
    found: dict[str, Any] = {}
    for file in sorted(run_dir.rglob("*")):
        # A lock is no result: that of a dead process says nothing, and goes when somebody needs the place.
        if file.is_file() and ".lock" not in file.suffixes:
            found[str(file.relative_to(run_dir))] = _content(file)
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Which files differ, for people; empty where none does."""
    lines = [f"missing: {name}" for name in expected.keys() - found.keys()]
    lines += [f"left behind: {name}" for name in found.keys() - expected.keys()]
    lines += [f"differs: {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return "\n".join(sorted(lines))


def _content(file: Path) -> Any:
    if file.name in _TIMED_FILES or file.suffix == ".svg":  # SVG has random ids
        return file.stat().st_size > 0
    if file.name == "manifest.json":
        manifest = _without_times(json.loads(file.read_text()))
        return {**manifest, "files": sorted(manifest["files"])}
    if file.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name in ("summary.json", "scores.json", "records.json"):
        return _without_times(json.loads(file.read_text()))
    if file.name == "ledger.json":
        return json.loads(file.read_text())
    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(held) for name, held in value.items() if name not in _TIMES | _HISTORY | _CODE}
    return [_without_times(held) for held in value] if isinstance(value, list) else value
