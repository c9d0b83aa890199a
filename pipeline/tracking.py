"""What a run did, told to a tracking server. Facts are on disk first; a tracker only ships them, and never stops a run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifacts import text_digest, write_text_atomically
from pipeline.errors import PipelineError
from pipeline.locks import this_process

log = logging.getLogger(__name__)
_SHIP_SECONDS = 5.0
_BATCH = 1000  # MLflow's limit for one log_batch call
_INPUT_ATTEMPTS = 3
PROCESS = "process"
"""Tag of a run, and label of a flow run: the process that works on it, as `pipeline.locks.this_process` names it."""


@dataclass(frozen=True)
class DataInput:
    """A data set that a run used: name, content digest, where it came from, rows, and what it was used for."""

    name: str
    digest: str
    source: str
    rows: int
    context: str


@dataclass(frozen=True)
class RunFacts:
    """What identifies a run and what is known before it starts.

    Attributes:
        key: identity on disk; the same key is the same run, also after a restart.
        name: short name for people, for example "distilllens s10".
        experiment: experiment it belongs to.
        params: flat settings.
        tags: labels to filter and group by.
        inputs: data sets.
    """

    key: str
    name: str
    experiment: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    inputs: Sequence[DataInput] = ()


class Tracker(Protocol):
    """Receives facts. Run ids are passed explicitly, never through a thread-local active run."""

    def delivered(self, key: str) -> str | None:
        """The id of the run with this key if everything about it was delivered before."""
        ...

    def start(self, run: RunFacts) -> str:
        """Create the run, or find it again by its key; returns its id."""
        ...

    def follow(self, run_id: str) -> Callable[[Path], None]:
        """A function that is told where metrics.jsonl is and ships it in the background until `finish`."""
        ...

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Final figures, without a step."""
        ...

    def log_steps(self, run_id: str, metrics_file: Path) -> None:
        """Everything in a metrics.jsonl that was not shipped yet."""
        ...

    def log_files(self, run_id: str, files: Sequence[Path], folder: str) -> None:
        """Files, under an artifact folder of the run."""
        ...

    def log_table(self, run_id: str, rows: Mapping[str, Sequence[Any]], file: str) -> None:
        """A table that the UI can show, columns by name."""
        ...

    def log_image(self, run_id: str, name: str, png: bytes) -> None:
        """An image; those of the same name in several runs are shown side by side."""
        ...

    def experiment_id(self, name: str) -> str | None:
        """The id of an experiment, made if need be; None if the store cannot be asked."""
        ...

    def describe(self, experiment: str, tags: Mapping[str, str]) -> None:
        """Labels of a whole experiment, its description among them."""
        ...

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """More labels."""
        ...

    def finish(self, run_id: str, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        ...


class NoTracker:
    """Tracks nothing."""

    def delivered(self, key: str) -> str | None:
        """See `Tracker`."""
        return None

    def start(self, run: RunFacts) -> str:
        """See `Tracker`."""
        return run.key

    def follow(self, run_id: str) -> Callable[[Path], None]:
        """See `Tracker`."""
        return lambda path: None

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""

    def log_steps(self, run_id: str, metrics_file: Path) -> None:
        """See `Tracker`."""

    def log_files(self, run_id: str, files: Sequence[Path], folder: str) -> None:
        """See `Tracker`."""

    def log_table(self, run_id: str, rows: Mapping[str, Sequence[Any]], file: str) -> None:
        """See `Tracker`."""

    def log_image(self, run_id: str, name: str, png: bytes) -> None:
        """See `Tracker`."""

    def experiment_id(self, name: str) -> str | None:
        """See `Tracker`."""
        return None

    def describe(self, experiment: str, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""

    def finish(self, run_id: str, status: str) -> None:
        """See `Tracker`."""


class MLflowTracker:
    """Ships to an MLflow store: the SQLite file in the run directory, or whatever MLFLOW_TRACKING_URI names.

    Every failure of the store is logged and remembered, none stops the work: what could not be delivered is still on
    disk in the run directory.
    """

    def __init__(self, run_dir: Path, experiment: str) -> None:
        self._runs = run_dir / experiment / "mlflow_runs"
        self._keys: dict[str, str] = {}
        self._followers: dict[str, _Follower] = {}
        self._artifact_root = run_dir.resolve() / "mlartifacts"
        self.failures: list[str] = []
        """What could not be delivered, one line each."""
        self.uri = configure_mlflow(run_dir)
        from mlflow import MlflowClient

        self._client = MlflowClient(self.uri)

    def start(self, run: RunFacts) -> str:
        """Create the run, or find it again by its key."""
        known = self._record(run.key).get("run_id")
        if known is not None and self._still_there(known):
            self._try("go on with a run", lambda: self._client.update_run(known, status="RUNNING"))
            self._keys[known] = run.key
            self.set_tags(known, {PROCESS: this_process()})
            return str(known)
        run_id = self._try("start a run", lambda: self._create(run))
        if run_id is None:
            return f"untracked:{run.key}"
        self._keys[run_id] = run.key
        self._write_record(run_id, finished=False)
        self._try("log settings", lambda: self._log_params(run_id, run.params))
        if run.inputs:
            self._try("log data sets", lambda: self._log_inputs(run_id, run.inputs))
        return str(run_id)

    def delivered(self, key: str) -> str | None:
        """The id of the run with this key if everything about it was delivered before and the store still has it."""
        record = self._record(key)
        if not record.get("finished") or not self._still_there(record["run_id"]):
            return None
        return str(record["run_id"])

    def follow(self, run_id: str) -> Callable[[Path], None]:
        """Ship a growing metrics.jsonl, and how busy the machine is meanwhile, from background threads."""

        def begin(path: Path) -> None:
            follower = _Follower(path, lambda records: self._ship(run_id, records), self._monitor(run_id))
            self._followers[run_id] = follower
            follower.start()

        return begin

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Final figures at step 0, rounded to four digits after the point, as the UI shows floats unrounded."""
        record = {"step": 0, "time": time.time(), "metrics": {name: round(float(value), 4) for name, value in metrics.items()}}
        self._try("log metrics", lambda: self._log_records(run_id, [record]))

    def log_steps(self, run_id: str, metrics_file: Path) -> None:
        """Ship a metrics.jsonl; records carry their own time stamps, so what was shipped before is not doubled."""
        follower = self._followers.pop(run_id, None)
        if follower is not None:
            follower.stop()
        records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
        self._try("log step metrics", lambda: self._log_records(run_id, records))

    def log_files(self, run_id: str, files: Sequence[Path], folder: str) -> None:
        """Files, under an artifact folder of the run."""
        for file in files:
            self._try(f"log {file.name}", lambda file=file: self._client.log_artifact(run_id, str(file), folder))  # type: ignore[misc]

    def log_table(self, run_id: str, rows: Mapping[str, Sequence[Any]], file: str) -> None:
        """A table that the UI can show."""
        self._try(f"log {file}", lambda: self._client.log_table(run_id, {k: list(v) for k, v in rows.items()}, file))

    def log_image(self, run_id: str, name: str, png: bytes) -> None:
        """An image for the UI's image grid, at step 0."""
        from PIL import Image

        self._try(f"log image {name}", lambda: self._client.log_image(run_id, Image.open(io.BytesIO(png)), key=name, step=0))

    def experiment_id(self, name: str) -> str | None:
        """The id of an experiment, made if need be."""
        found = self._try("find an experiment", lambda: self._experiment(name))
        return None if found is None else str(found)

    def describe(self, experiment: str, tags: Mapping[str, str]) -> None:
        """Tags of an experiment; the note is what the UI shows as its description."""

        def tell() -> None:
            identity = self._experiment(experiment)
            for name, value in tags.items():
                self._client.set_experiment_tag(identity, name, value)

        self._try("describe an experiment", tell)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """More labels."""
        from mlflow.entities import RunTag

        entities = [RunTag(_tag_name(name), value) for name, value in tags.items()]
        self._try("set tags", lambda: self._client.log_batch(run_id, tags=entities))

    def finish(self, run_id: str, status: str) -> None:
        """Close the run."""
        follower = self._followers.pop(run_id, None)
        if follower is not None:
            follower.stop()
        failures = len(self.failures)
        self._try("finish a run", lambda: self._client.set_terminated(run_id, status))
        if status == "FINISHED" and len(self.failures) == failures:
            self._write_record(run_id, finished=True)

    def _record(self, key: str) -> dict[str, Any]:
        """What is remembered of a run in this store: run_id, finished; empty if it is not known there."""
        path = self._record_path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError:
            log.warning("%s is not readable; its run is created anew", path)
            return {}
        return record if isinstance(record, dict) and record.get("uri") == self.uri else {}

    def _write_record(self, run_id: str, finished: bool) -> None:
        key = self._keys[run_id]
        self._runs.mkdir(parents=True, exist_ok=True)
        record = {"key": key, "uri": self.uri, "run_id": run_id, "finished": finished}
        write_text_atomically(self._record_path(key), json.dumps(record))

    def _record_path(self, key: str) -> Path:
        # A file for each run, so that processes that track different ones never write the same file.
        return self._runs / f"{text_digest(key)[:16]}.json"

    def _create(self, run: RunFacts) -> str:
        tags = {**{_tag_name(name): value for name, value in run.tags.items()}, PROCESS: this_process()}
        return str(self._client.create_run(self._experiment(run.experiment), run_name=run.name, tags=tags).info.run_id)

    def _log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # None is the absence of a setting: a column for it would say nothing.
        params = [Param(name, str(value)[:6000]) for name, value in values.items() if value is not None]
        for start in range(0, len(params), 100):  # MLflow's limit for one call
            self._client.log_batch(run_id, params=params[start : start + 100])

    def _log_inputs(self, run_id: str, inputs: Sequence[DataInput]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        entities = [
            DatasetInput(
                Dataset(
                    name=data.name, digest=data.digest[:36], source_type="local", source=json.dumps({"uri": data.source}),
                    profile=json.dumps({"num_rows": data.rows}),
                ),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in inputs
        ]  # fmt: skip
        for attempt in range(_INPUT_ATTEMPTS):
            try:
                return self._client.log_inputs(run_id, entities)
            except MlflowException:
                # The store looks for a data set and then adds it: of two processes with a new one, one finds it added before.
                if attempt == _INPUT_ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * (attempt + 1))

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Through a server the artifact location is the server's business.
        location = (self._artifact_root / name).as_uri() if self.uri.startswith("sqlite:") else None
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)  # another process made it meanwhile

    def _monitor(self, run_id: str) -> Any:
        """MLflow's own watch over processor, memory, disk, network and accelerator, None where it is switched off."""
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("true", "1"):
            return None
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.uri)  # type: ignore[no-untyped-call]
            monitor.start()  # type: ignore[no-untyped-call]
        except Exception as error:  # counters that a container does not have fail in many ways; training needs none of them
            log.warning("MLflow: no system metrics of this run: %s", error)
            return None
        return monitor

    def _still_there(self, run_id: str) -> bool:
        return self._try("find a run", lambda: self._client.get_run(run_id)) is not None

    def _ship(self, run_id: str, records: Sequence[Mapping[str, Any]]) -> bool:
        failures = len(self.failures)
        self._try("log step metrics", lambda: self._log_records(run_id, records))
        return len(self.failures) == failures

    def _log_records(self, run_id: str, records: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(record["time"] * 1000), int(record["step"]))
            for record in records
            for name, value in record["metrics"].items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return action()
        except (MlflowException, OSError) as error:
            line = f"MLflow: could not {what}: {str(error).strip().splitlines()[0]}"
            self.failures.append(line)
            log.warning("%s (the facts stay in the run directory)", line)
            return None


class _Follower(threading.Thread):
    """Ships the new lines of a growing file every few seconds."""

    def __init__(self, path: Path, ship: Callable[[Sequence[Mapping[str, Any]]], bool], monitor: Any) -> None:
        super().__init__(name="metrics-shipper", daemon=True)
        self._path, self._ship, self._monitor, self._offset = path, ship, monitor, 0
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(_SHIP_SECONDS):
            self._ship_new()

    def stop(self) -> None:
        """Stop; what was not shipped yet is shipped by `log_steps` from the file."""
        self._stopping.set()
        if self._monitor is not None:
            self._monitor.finish()
        self.join(timeout=30)

    def _ship_new(self) -> None:
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                lines = stream.read()
        except FileNotFoundError:
            return  # not begun yet, or the finished folder was renamed away
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole and self._ship([json.loads(line) for line in whole.splitlines()]):
            self._offset += len(whole)


def configure_mlflow(run_dir: Path) -> str:
    """Settings for the embedded store, each only where the user has none of their own; returns the tracking URI."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_TRACKING_URI": f"sqlite:///{run_dir.resolve() / 'mlflow.db'}",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    return str(os.environ["MLFLOW_TRACKING_URI"])


def _tag_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`; "weight=0.5" becomes "weight:0.5"."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("=", ":"), flags=re.ASCII)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` → value; lists stay values."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{name}.")
        else:
            flat[name] = item
    return flat


@contextlib.contextmanager
def tracked(tracker: Tracker, run_id: str) -> Iterator[None]:
    """Mark the run FAILED or KILLED if the body does not end well; ending it well is left to the caller."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tracker.finish(run_id, "KILLED")
        raise
    except PipelineError as error:
        tracker.finish(run_id, "KILLED" if error.exit_code == 128 + signal.SIGTERM else "FAILED")
        raise
    except BaseException:
        tracker.finish(run_id, "FAILED")
        raise
