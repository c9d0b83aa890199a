"""An MLflow store, told things twice without harm: every call here leaves the same when it is repeated.

A run carries its key as a tag and is looked for before it is made. Metrics have their own time stamps, and MLflow's
primary key (run, key, time stamp, step, value) drops what is there already, in a database as behind a server. Settings
are equal, labels and states overwrite, files have names that do not depend on when they were sent.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.remote import without_secrets
from pipeline.tracking.facts import PROCESS

KEY_TAG = "distilllens.key"
"""Tag of a run: its key on disk."""
_BATCH = 1000  # MLflow's limit for one log_batch call
# Answers that may be others later: no or wrong credentials, no such page (another server, or one that starts), too busy.
_PASSING = {401, 403, 404, 407, 408, 409, 425, 429, 499}
_LOCAL_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def configure_mlflow(run_dir: Path) -> str:
    """Settings for the embedded store, each only where the user has none of their own; returns the tracking URI."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # What fails is tried again by the delivery, which knows what it has sent; MLflow would send the creation of a run
        # again whose answer was lost.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
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


class MLflowStore:
    """The store at an address, opened (and made, for a new database) at once.

    Args:
        uri: tracking URI.
        artifact_root: where artifacts go if the store is a local database; a server decides for itself.
    """

    def __init__(self, uri: str, artifact_root: Path) -> None:
        from mlflow import MlflowClient

        self.name = without_secrets(uri)
        """What its progress is written down under."""
        self._embedded = uri.startswith("sqlite:///")
        self._artifact_root = artifact_root
        if self._embedded:
            _make_database(Path(uri.removeprefix("sqlite:///")))
        self._client = MlflowClient(uri)
        self._experiments: dict[str, str] = {}

    def forget(self) -> None:
        """Ask for experiments anew; something failed, perhaps because they are not what they were."""
        self._experiments.clear()

    def experiment(self, name: str) -> str:
        """The id of an experiment, made if need be."""
        from mlflow.exceptions import MlflowException

        if name in self._experiments:
            return self._experiments[name]
        found: Any = self._client.get_experiment_by_name(name)
        if found is None:
            # Through a server the artifact location is the server's business.
            location = (self._artifact_root / name).as_uri() if self._embedded else None
            try:
                self._client.create_experiment(name, artifact_location=location)
            except MlflowException:
                if self._client.get_experiment_by_name(name) is None:
                    raise  # otherwise another process made it meanwhile
            found = self._client.get_experiment_by_name(name)
        self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def create(self, start: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """The run with a key, made if it is not there; returns its id."""
        experiment = self.experiment(start["experiment"])
        if not self._runs(start["key"], [experiment]):
            self._client.create_run(
                experiment, start_time=_milliseconds(start["time"]), run_name=start["name"],
                tags={**tags, KEY_TAG: start["key"], PROCESS: start["process"]},
            )  # fmt: skip
        run_id = min(self._runs(start["key"], [experiment]))
        self.leave_one(start["key"], experiment, run_id)
        return run_id

    def leave_one(self, key: str, experiment: str, run_id: str) -> None:
        """Delete other runs with the key of this one: a creation whose answer came too late, or never, was made again."""
        for other in self._runs(key, [experiment]):
            if other != run_id:
                self._client.delete_run(other)

    def find(self, key: str) -> str | None:
        """The id of the run with a key, in whatever experiment."""
        experiments = [found.experiment_id for found in self._client.search_experiments()]
        return min(self._runs(key, experiments), default=None)

    def run_ids(self, experiment: str) -> set[str]:
        """Every run of an experiment, those in its bin too."""
        from mlflow.entities import ViewType

        found, token = set[str](), None
        while True:
            page = self._client.search_runs([self.experiment(experiment)], run_view_type=ViewType.ALL, page_token=token)
            found |= {str(run.info.run_id) for run in page}
            token = page.token
            if not token:
                return found

    def state(self, run_id: str) -> str | None:
        """Where a run is in its life: active or deleted; None if the store knows none of that id."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.get_run(run_id).info.lifecycle_stage)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def go_on(self, run_id: str, start: Mapping[str, Any]) -> None:
        """A process works on the run again."""
        self._client.update_run(run_id, status="RUNNING")
        self.set_tags(run_id, {KEY_TAG: start["key"], PROCESS: start["process"]})

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Settings."""
        from mlflow.entities import Param

        entities = [Param(name, value) for name, value in params.items()]
        for start in range(0, len(entities), 100):  # MLflow's limit for one call
            self._client.log_batch(run_id, params=entities[start : start + 100])

    def log_inputs(self, run_id: str, inputs: Sequence[Mapping[str, Any]]) -> None:
        """Data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entities = [
            DatasetInput(
                Dataset(
                    name=data["name"], digest=data["digest"][:36], source_type="local",
                    source=json.dumps({"uri": data["source"]}), profile=json.dumps({"num_rows": data["rows"]}),
                ),
                [InputTag("mlflow.data.context", data["context"])],
            )
            for data in inputs
        ]  # fmt: skip
        self._client.log_inputs(run_id, entities)

    def log_metrics(self, run_id: str, points: Iterable[Mapping[str, Any]]) -> None:
        """Records of step, time in seconds, and metrics by name."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), _milliseconds(point["time"]), int(point["step"]))
            for point in points
            for name, value in point["metrics"].items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def log_file(self, run_id: str, file: Path, path: str) -> None:
        """A file, as the artifact `path`, whose name it has."""
        folder, _, _ = path.rpartition("/")
        self._client.log_artifact(run_id, str(file), folder or None)

    def show_table(self, run_id: str, path: str) -> None:
        """Tell the UI that an artifact is a table; what MLflow's log_table does, which would add the rows once more."""
        tag = "mlflow.loggedArtifacts"
        known = json.loads(self._client.get_run(run_id).data.tags.get(tag, "[]"))
        shown = {"path": path, "type": "table"}
        if shown not in known:
            self._client.set_tag(run_id, tag, json.dumps([*known, shown]))

    def log_model(self, run_id: str, folder: Path, name: str) -> None:
        """A transformers folder as an MLflow model of the run."""
        from pipeline.mlflow_model import deliver_model

        deliver_model(self._client, run_id, folder, name)

    def describe(self, experiment: str, tags: Mapping[str, str]) -> None:
        """Tags of an experiment; the note is what the UI shows as its description."""
        identity = self.experiment(experiment)
        for name, value in tags.items():
            self._client.set_experiment_tag(identity, name, value)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Labels."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def finish(self, run_id: str, status: str, time: float) -> None:
        """Close a run."""
        self._client.set_terminated(run_id, status, _milliseconds(time))

    def _runs(self, key: str, experiments: list[str]) -> list[str]:
        found = self._client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'") if experiments else []
        return [str(run.info.run_id) for run in found]


def _make_database(path: Path) -> None:
    """Make a database file that is not there yet, whole or not at all.

    MLflow makes it in many steps, which take seconds: a process that ends meanwhile would leave one that nobody can open,
    and two processes would get into each other's way.
    """
    from mlflow import MlflowClient

    if path.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{fresh}")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.copyfile(fresh, beside)
    try:
        os.link(beside, path)
    except FileExistsError:  # another process was faster
        pass
    finally:
        beside.unlink()


def trials_of(error: Exception) -> int | None:
    """How often something that failed so is tried before it is set aside; None for as long as it takes.

    None is for a server that is away or busy. What it calls a bad request gets a few trials, as a bad request of two
    processes at a time is a good one afterwards; so do files that cannot be read or written here. Whatever else libraries
    raise may be a network in their way, or an error for good, and gets trials for some minutes.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    few, many = 3, 8
    if isinstance(error, MlflowException):
        gone = error.error_code == "RESOURCE_DOES_NOT_EXIST"
        # MLflow makes a server's error of most answers that are not its own.
        answer = re.search(r"failed with error code (\d{3})", error.message)
        status = int(answer[1] if answer else error.get_http_status_code())  # type: ignore[no-untyped-call]
        return few if gone or _is_refusal(status) else None
    if isinstance(error, RequestException):
        return few if error.response is not None and _is_refusal(error.response.status_code) else None
    if isinstance(error, OSError):
        return few if error.errno in _LOCAL_ERRORS else None
    return few if isinstance(error, (ValueError, TypeError, KeyError, ImportError, PipelineError)) else many


def _is_refusal(status: int) -> bool:
    return 400 <= status < 500 and status not in _PASSING


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
