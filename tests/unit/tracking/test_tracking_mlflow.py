"""What the MLflow tracker leaves in a store."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.tracking import MLflowTracker, RunFacts

RUN = RunFacts("key", "kd s10", "tiny", {"method": "kd", "on_policy": None, "lora": False}, {"stage": "trial"})


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MLflowTracker:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    return MLflowTracker(tmp_path, "tiny")


def test_settings_images_descriptions_and_the_machine(tracker: MLflowTracker, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client, run_id = MlflowClient(tracker.uri), tracker.start(RUN)
    tracker.follow(run_id)(tmp_path / "metrics.jsonl")
    deadline = time.monotonic() + 60
    # A setting that is absent is no column, one that is false is.
    while "system/cpu_utilization_percentage" not in client.get_run(run_id).data.metrics and time.monotonic() < deadline:
        time.sleep(0.1)
    stream = io.BytesIO()
    Image.new("RGB", (4, 3)).save(stream, format="png")
    tracker.log_image(run_id, "figures/scores", stream.getvalue())
    tracker.describe("tiny", {"mlflow.note.content": "what came out"})
    tracker.finish(run_id, "FINISHED")
    run = client.get_run(run_id)
    assert run.data.params == {"method": "kd", "lora": "False"}
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert "system/system_memory_usage_megabytes" in run.data.metrics
    names = [file.path for file in client.list_artifacts(run_id, "images")]
    assert len(names) == 2 and all(name.startswith("images/figures~scores+step+0+") for name in names)
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.note.content"] == "what came out"
    assert tracker.failures == [] and run.info.status == "FINISHED"


def test_the_machine_is_not_watched_where_that_is_switched_off(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    run_id = tracker.start(RUN)
    tracker.follow(run_id)(tmp_path / "metrics.jsonl")
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    tracker.finish(run_id, "FINISHED")


def test_training_goes_on_where_the_machine_cannot_be_watched(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.system_metrics import system_metrics_monitor

    def broken() -> None:
        raise AttributeError("no counters here")

    monkeypatch.setattr(system_metrics_monitor, "DiskMonitor", broken)
    run_id = tracker.start(RUN)
    tracker.follow(run_id)(tmp_path / "metrics.jsonl")
    tracker.finish(run_id, "FINISHED")
    assert "no system metrics of this run: no counters here" in caplog.text
