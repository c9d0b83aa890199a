"""A whole experiment on tiny random models, in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import yaml


def write(folder: Path, **changes: Any) -> Path:
    """Teacher of 6 layers, student of 3, four methods, two benchmarks; returns the experiment file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher").exists():
        tiny.save(tiny.llama(layers=6), folder / "teacher")
        tiny.write_rows(folder / "train.jsonl", 24)
        tiny.write_rows(folder / "dev.jsonl", 6, seed=1)
        tiny.write_rows(folder / "general.jsonl", 5, seed=2)
        tiny.write_rows(folder / "tasks.jsonl", 4, seed=3)
    content: dict[str, Any] = {
        "name": "tiny",
        "teacher": {"kind": "local", "path": str(folder / "teacher")},
        "student": {"kind": "pruned", "keep_layers": 3, "calibration_rows": 8},
        "data": {"train": {"path": str(folder / "train.jsonl")}, "dev": {"path": str(folder / "dev.jsonl")}},
        "benchmarks": {
            "general": {"source": {"path": str(folder / "general.jsonl")}},
            "tasks": {"source": {"path": str(folder / "tasks.jsonl")}},
        },
        "methods": {
            "sft": None,
            "kd": None,
            "mse": {"features": {"pairs": {"kind": "uniform", "count": 2}}},
            "distilllens": {"lens": {"pairs": {"kind": "uniform", "count": 2}}},
        },
        "train": {"max_steps": 4, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2, "seeds": [10, 20]},
        "validation": {"decoding": {"max_new_tokens": 8}},
        "evaluation": {"decoding": {"max_new_tokens": 8}, "seeds": [1, 2]},
        "cache": {"dtype": "float32"},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}), encoding="utf-8")
    return path
