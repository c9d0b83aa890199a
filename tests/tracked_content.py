"""What an MLflow store holds, in a form that two runs of the same work have in common: without ids and times."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

_OWN_TIMES = re.compile(r"seconds|tokens_per_second|peak_memory")
_OWN_TAGS = {"process", "distilllens.key", "mlflow.user", "mlflow.source.name", "mlflow.source.type", "checkpoint"}
_OWN_FILES = {"config/config.yaml"}


def content(client: Any, experiments: list[str]) -> dict[str, Any]:
    """Experiment → its tags and its runs, sorted; ids are names, figures that are times are only counted."""
    found = {name: client.get_experiment_by_name(name) for name in experiments}
    held = {name: list(client.search_runs([e.experiment_id], max_results=1000)) for name, e in found.items() if e is not None}
    names = {run.info.run_id: f"run {run.info.run_name}" for runs in held.values() for run in runs}
    names |= {f"experiments/{e.experiment_id}/": f"experiments/{name}/" for name, e in found.items() if e is not None}

    def named(text: str) -> str:
        for identity, name in names.items():
            text = text.replace(identity, name)
        return text

    def run(held: Any) -> dict[str, Any]:
        run_id, data = held.info.run_id, held.data
        return {
            "name": held.info.run_name,
            "status": held.info.status,
            "ended": held.info.end_time is not None,
            "params": data.params,
            "tags": {name: named(value) for name, value in data.tags.items() if name not in _OWN_TAGS},
            "metrics": {
                name: _history(client, run_id, name) for name in sorted(data.metrics) if not name.startswith("system/")
            },
            "inputs": sorted((i.dataset.name, i.dataset.digest, i.tags[0].value) for i in held.inputs.dataset_inputs),
            "files": _files(client, run_id),
        }

    return {
        name: {
            "tags": {key: named(value) for key, value in found[name].tags.items()},
            "runs": sorted(map(run, runs), key=lambda each: str(each["name"])),
        }
        for name, runs in held.items()
    }


def _history(client: Any, run_id: str, name: str) -> list[tuple[int, float | None]]:
    points = client.get_metric_history(run_id, name)
    assert [p.timestamp for p in points] == sorted(p.timestamp for p in points), f"{name} is not in order"
    return [(point.step, None if _OWN_TIMES.search(name) else point.value) for point in points]


def _files(client: Any, run_id: str, folder: str | None = None) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for file in client.list_artifacts(run_id, folder):
        if file.is_dir:
            found |= _files(client, run_id, file.path)
        elif file.path in _OWN_FILES:
            found[file.path] = None
        else:
            with tempfile.TemporaryDirectory() as target:
                found[file.path] = Path(client.download_artifacts(run_id, file.path, target)).read_bytes()
    return found
