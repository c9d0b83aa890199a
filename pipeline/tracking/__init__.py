"""What a run did, told to a tracking server: written to disk first, delivered in the background, never in a run's way."""

from __future__ import annotations

from pipeline.tracking.facts import (
    PROCESS,
    DataInput,
    NoTracker,
    RunFacts,
    Tracker,
    experiment_reference,
    flatten,
    run_reference,
    stage_experiment,
    tracked,
)
from pipeline.tracking.mlflow_store import configure_mlflow
from pipeline.tracking.tracker import MLflowTracker, deliver

__all__ = [
    "PROCESS",
    "DataInput",
    "MLflowTracker",
    "NoTracker",
    "RunFacts",
    "Tracker",
    "configure_mlflow",
    "deliver",
    "experiment_reference",
    "flatten",
    "run_reference",
    "stage_experiment",
    "tracked",
]
