"""What the flow tracks of a comparison is enough to make it again."""

from __future__ import annotations

from pathlib import Path

import experiment

from pipeline.reporting.record_files import read_records
from pipeline.reporting.sources import open_source


def test_a_comparison_is_read_from_the_store_that_the_flow_filled(prefect_server: None, run_dir: Path) -> None:
    from flows.reproduce import reproduce

    config = experiment.write(run_dir.parent, methods={"kd": None}, cache={"enabled": False})
    overrides = ["train.seeds=[10]", "train.max_steps=1", "validation.select=last", "evaluation.seeds=[1]"]
    reproduce(config=str(config), overrides=overrides, run_dir=str(run_dir))
    stored, here = open_source("mlflow:tiny", run_dir), read_records(run_dir / "tiny" / "comparison")
    assert stored.facts == here.facts and stored.facts.baseline == "kd"
    assert {name: table.to_pylist() for name, table in stored.generations.tables.items()} == {
        name: table.to_pylist() for name, table in here.generations.tables.items()
    }
