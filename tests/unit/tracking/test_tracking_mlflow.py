"""The tracker as its callers see it: what it leaves in a store, and that it never keeps anybody waiting."""

from __future__ import annotations

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.tracking import MLflowTracker, RunFacts, deliver, tracked
from pipeline.tracking import tracker as module
from pipeline.tracking.mlflow_store import MLflowStore
from pipeline.tracking.spool import Progress, spool_of

RUN = RunFacts("key", "kd s10", "tiny", {"method": "kd", "on_policy": None, "lora": False}, {"stage": "trial"})


@pytest.fixture
def uri(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.copy(database, tmp_path / "mlflow.db")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    return address


class Silent:
    """A server that accepts and never answers, at the address that the tracker is told."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.listener.settimeout(60)
        self.held: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def hold(self) -> None:
        """Wait for a call, which is never answered."""
        self.held.append(self.listener.accept()[0])

    def die(self) -> None:
        """Cut off whoever waits."""
        for each in (self.listener, *self.held):
            each.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    server = Silent()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield server
    server.die()


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3)).save(stream, format="png")
    return stream.getvalue()


def test_settings_images_descriptions_and_the_machine(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with MLflowTracker(tmp_path, "tiny") as tracker:
        run = tracker.start(RUN)
        tracker.follow(run)(tmp_path / "metrics.jsonl")
        machine = tmp_path / "tiny" / "mlflow_runs"
        while not list(machine.glob("*/machine.jsonl")):  # bounded by the test's own limit
            time.sleep(0.05)
        tracker.log_image(run, "figures/scores", png())
        tracker.describe(run, "tiny", {"mlflow.note.content": "what came out"})
        tracker.finish(run, "FINISHED")
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    # A setting that is absent is no column, one that is false is.
    assert found.data.params == {"method": "kd", "lora": "False"}
    assert "system/cpu_utilization_percentage" in found.data.metrics
    assert "system/system_memory_usage_megabytes" in found.data.metrics
    names = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    assert len(names) == 2 and all(name.startswith("images/figures~scores+step+0+timestamp+") for name in names)
    assert client.get_experiment_by_name("tiny").tags["mlflow.note.content"] == "what came out"
    assert tracker.complete and found.info.status == "FINISHED"


def test_images_have_the_form_that_mlflow_gives_them(uri: str, tmp_path: Path) -> None:
    """The UI takes everything that it knows of an image from its name."""
    from mlflow import MlflowClient

    with MLflowTracker(tmp_path, "tiny") as tracker:
        tracker.log_image(tracker.start(RUN), "figures/scores", png())
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    client.log_image(found.info.run_id, Image.new("RGB", (4, 3)), key="figures/scores", step=0)

    def parts(path: str) -> tuple[Any, ...]:
        stem, _, ending = path.rpartition(".")
        name, step, number, timestamp, milliseconds, identity, *rest = stem.split("+")
        return name, step, number, timestamp, milliseconds.isdigit(), bool(identity), rest, ending

    theirs, ours = [], []
    for file in client.list_artifacts(found.info.run_id, "images"):
        (ours if "+timestamp+1+" in file.path else theirs).append(parts(file.path))
    assert sorted(ours) == sorted(theirs) and len(ours) == 2


def test_the_machine_is_not_watched_where_that_is_switched_off(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    tracker = MLflowTracker(tmp_path, "tiny")
    tracker.follow(tracker.start(RUN))(tmp_path / "metrics.jsonl")
    assert "machine-watch" not in {thread.name for thread in threading.enumerate()}
    tracker.close()


def test_training_goes_on_where_the_machine_cannot_be_watched(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.system_metrics.metrics import disk_monitor

    def broken() -> None:
        raise AttributeError("no counters here")

    monkeypatch.setattr(disk_monitor, "DiskMonitor", broken)
    tracker = MLflowTracker(tmp_path, "tiny")
    tracker.follow(tracker.start(RUN))(tmp_path / "metrics.jsonl")
    assert "no system metrics of this run: no counters here" in caplog.text
    tracker.close()


def test_training_goes_on_where_counters_fail_later(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.system_metrics.metrics import disk_monitor

    def broken(self: Any) -> None:
        raise OSError("the disk has no counters any more")

    monkeypatch.setattr(disk_monitor.DiskMonitor, "collect_metrics", broken)
    with MLflowTracker(tmp_path, "tiny") as tracker:
        run = tracker.start(RUN)
        tracker.follow(run)(tmp_path / "metrics.jsonl")
        while any(thread.name == "machine-watch" for thread in threading.enumerate()):
            time.sleep(0.01)
        tracker.finish(run, "FINISHED")
    assert "no more system metrics of this run: the disk has no counters any more" in caplog.text
    assert tracker.complete


def test_nobody_waits_for_a_server_that_does_not_answer(
    silent: Silent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything that a trial tells, while the server holds the first call: no call goes out from this thread."""
    callers = set[str]()
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        callers.add(threading.current_thread().name)
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    steps = tmp_path / "metrics.jsonl"
    steps.write_text(json.dumps({"step": 1, "time": 1.0, "metrics": {"train/loss": 1.0}}) + "\n")
    with MLflowTracker(tmp_path, "tiny") as tracker:
        assert tracker.told("key") is None
        run = tracker.start(RUN)
        silent.hold()  # the delivery has begun
        with tracked(tracker, run):
            tracker.follow(run)(steps)
            tracker.log_steps(run, steps)
            tracker.log_metrics(run, {"a": 1.0})
            tracker.log_files(run, [steps], "stage")
            tracker.log_table(run, {"a": ["b"]}, "generations/general.json")
            tracker.log_image(run, "figures/scores", png())
            tracker.log_model(run, tmp_path, "kd s10")
            tracker.set_tags(run, {"a": "b"})
            tracker.link(run, "prepare/x", "trial.kd s10")
            tracker.describe(run, "tiny", {"a": "b"})
            tracker.finish(run, "FINISHED")
        assert tracker.told("key") == run  # what waits need not be told again
    assert callers == {"mlflow-delivery"}
    assert not tracker.complete
    assert f"records wait in {tmp_path / 'tiny' / 'mlflow_runs'}" in caplog.text
    assert f"distilllens deliver --run-dir {tmp_path}" in caplog.text


def test_what_waits_is_delivered_by_the_next_command(
    silent: Silent, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent.address)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    with MLflowTracker(tmp_path, "tiny") as tracker:
        tracker.finish(tracker.start(RUN), "FINISHED")
        silent.hold()
    silent.die()
    tracker._delivery.join(10)  # its call is cut off with the server
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert deliver(tmp_path) == {"tiny": 0} and deliver(tmp_path) == {}
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert (found.info.run_name, found.info.status) == ("kd s10", "FINISHED")


def test_a_disk_that_cannot_be_written_does_not_stop_a_run(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MLflowTracker(tmp_path, "tiny")
    run = tracker.start(RUN)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "_folder", tmp_path / "file")
        tracker.log_table(run, {"a": ["b"]}, "generations/general.json")
    tracker.finish(run, "FINISHED")
    assert caplog.text.count("MLflow will not be told the table of run key: ") == 1
    tracker.close()
    assert not tracker.complete and tracker.told("key") is None  # the next call tells it again


def test_a_run_that_goes_on_is_not_told_the_same_figures_twice(uri: str, tmp_path: Path) -> None:
    for value in (1.0, 1.00001, 2.0):
        tracker = MLflowTracker(tmp_path, "tiny")
        run = tracker.start(RUN)
        tracker.log_metrics(run, {"a": value, "b": 5})
        tracker.close()
    told = [
        record["metrics"] for record, _ in spool_of(tmp_path / "tiny" / "mlflow_runs", run).records() if "metrics" in record
    ]
    assert told == [{"a": 1.0, "b": 5.0}, {"a": 2.0}]


def test_a_run_that_an_earlier_version_delivered_counts_as_told(uri: str, tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "tiny" / "mlflow_runs", "key")
    spool.save(Progress("key", uri, "run", finished=True))
    tracker = MLflowTracker(tmp_path, "tiny")
    assert tracker.told("key") == "key" and tracker.told("other") is None
    tracker.close()


def test_a_database_is_there_whole_or_not_at_all(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends while the database is made leaves none, and the next one makes it."""
    import mlflow

    uri, made = f"sqlite:///{tmp_path / 'mlflow.db'}", []
    real = mlflow.MlflowClient

    def client(address: str) -> Any:
        made.append(address)
        if address != uri:  # elsewhere
            shutil.copy(database, address.removeprefix("sqlite:///"))
            if len(made) == 1:
                raise KeyboardInterrupt
        return real(address)

    monkeypatch.setattr(mlflow, "MlflowClient", client)
    with pytest.raises(KeyboardInterrupt):
        MLflowStore(uri, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == []
    assert MLflowStore(uri, tmp_path).experiment("tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"] and made[-1] == uri and len(made) == 3


@pytest.mark.parametrize(
    ("left", "said", "code"),
    [
        ({}, "nothing waits\n", 0),
        ({"a": 0}, "a: delivered\n", 0),
        ({"a": 0, "b": 3}, "a: delivered\nb: 3 records are left\n", 1),
    ],
)
def test_the_command_tells_what_is_left(
    left: dict[str, int],
    said: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import typer

    from pipeline import cli, tracking

    monkeypatch.setattr(tracking, "deliver", {tmp_path: left}.__getitem__)
    with pytest.raises(typer.Exit) as ended:
        cli.deliver(tmp_path)
    assert (capsys.readouterr().out, ended.value.exit_code) == (said, code)
