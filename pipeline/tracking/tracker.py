"""The tracker of MLflow: tells the spool, and has it delivered in the background."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.artifacts import text_digest
from pipeline.locks import this_process
from pipeline.remote import without_secrets
from pipeline.tracking.delivery import DeliveryThread, refused, try_refused_again, waiting
from pipeline.tracking.facts import RunFacts
from pipeline.tracking.mlflow_store import MLflowStore, configure_mlflow
from pipeline.tracking.spool import Spool, spool_of
from pipeline.tracking.watch import FILE, MachineWatch, watch_machine

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 20.0
"""How long the end of a command waits for the store, counted from the last step that was delivered."""
SHORT_PATIENCE_SECONDS = 3.0
"""The same where the store does not answer anyway, or the command was interrupted."""
_POLL_SECONDS = 0.02
_STEPS_FILE = "steps.jsonl"


class MLflowTracker:
    """Tells an MLflow store: the SQLite file in the run directory, or whatever MLFLOW_TRACKING_URI names.

    Everything is written down under RUN_DIR/NAME/mlflow_runs first (see `pipeline.tracking.spool`), and a thread delivers
    it, also what earlier commands left there. No call waits for the store, none raises what the store or the disk says.
    Used in a `with` statement, whose end waits for what is still to be delivered as long as there is progress.
    """

    def __init__(self, run_dir: Path, experiment: str) -> None:
        self.uri = configure_mlflow(run_dir)
        """The store's address."""
        self._store = without_secrets(self.uri)
        self._run_dir, self._folder = run_dir, run_dir / experiment / "mlflow_runs"
        self._watches: dict[str, MachineWatch] = {}
        self._lost = False  # whether something could not even be written down
        self._folder.mkdir(parents=True, exist_ok=True)
        import mlflow  # noqa: F401  # here, where nothing else is imported at the same time

        root = run_dir.resolve() / "mlartifacts"
        self._delivery = DeliveryThread(self._folder, lambda: MLflowStore(self.uri, root))
        self._delivery.start()

    def __enter__(self) -> MLflowTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(PATIENCE_SECONDS if kind is None else SHORT_PATIENCE_SECONDS)

    @property
    def complete(self) -> bool:
        """Whether the store has everything that was ever told in this folder."""
        return not (self._lost or waiting(self._folder, self._store) or refused(self._folder))

    def told(self, key: str) -> str | None:
        """The handle of the run with this key if it was told to its good end before."""
        spool = spool_of(self._folder, key)
        # An earlier version wrote down no more than that everything was delivered.
        status = spool.status() or ("FINISHED" if spool.progress(self._store).finished else None)
        return key if status == "FINISHED" else None

    def start(self, run: RunFacts) -> str:
        """Begin the run, or go on with it."""
        tags = {_tag_name(name): value for name, value in run.tags.items()}
        record = {"op": "start", "name": run.name, "experiment": run.experiment, "tags": tags, "process": this_process()}
        self._tell(run.key, record)
        # None is the absence of a setting: a column for it would say nothing.
        params = {name: str(value)[:6000] for name, value in run.params.items() if value is not None}
        self._tell(run.key, {"op": "params", "params": params})
        if run.inputs:
            self._tell(run.key, {"op": "inputs", "inputs": [asdict(data) for data in run.inputs]})
        return run.key

    def follow(self, run: str) -> Callable[[Path], None]:
        """Ship a growing metrics.jsonl, and how busy the machine is meanwhile."""

        def begin(path: Path) -> None:
            self._tell(run, {"op": "follow", "series": "steps", "file": str(path.absolute())})
            watch = watch_machine(spool_of(self._folder, run))
            if watch is not None:
                self._watches[run] = watch
                self._tell(run, {"op": "follow", "series": "machine", "file": FILE})

        return begin

    def log_metrics(self, run: str, metrics: Mapping[str, float]) -> None:
        """Final figures at step 0, rounded to four digits after the point, as the UI shows floats unrounded."""
        known = spool_of(self._folder, run).figures()
        rounded = {name: round(float(value), 4) for name, value in metrics.items()}
        # A run that goes on after a kill tells again what it told before; that is one point, not two.
        new = {name: value for name, value in rounded.items() if known.get(name) != value}
        if new:
            self._tell(run, {"op": "metrics", "metrics": new})

    def log_steps(self, run: str, metrics_file: Path) -> None:
        """The rest of a metrics.jsonl that is finished."""
        self._stop_watching(run)
        record = {"op": "steps", "series": "steps", "file": _STEPS_FILE}
        self._tell(run, record, lambda spool: spool.keep_beside(_STEPS_FILE, metrics_file))

    def log_files(self, run: str, files: Sequence[Path], folder: str) -> None:
        """Files and whole folders, under an artifact folder of the run; what they hold now, whatever becomes of them."""
        kept: dict[str, Path] = {}
        for file in files:
            for each in sorted(file.rglob("*")) if file.is_dir() else [file]:
                if each.is_file():
                    kept[f"{folder}/{each.relative_to(file.parent).as_posix()}"] = each

        def keep(spool: Spool) -> None:
            for path, each in kept.items():
                spool.keep(path, each)

        self._tell(run, {"op": "files", "paths": list(kept)}, keep)

    def log_table(self, run: str, rows: Mapping[str, Sequence[Any]], file: str) -> None:
        """A table that the UI can show: JSON in the form of pandas' "split", as MLflow's own tables."""
        data = [[_json_value(value) for value in row] for row in zip(*rows.values(), strict=True)]
        content = json.dumps({"columns": list(rows), "data": data}).encode()
        self._tell(run, {"op": "table", "path": file}, lambda spool: spool.keep(file, content))

    def log_image(self, run: str, name: str, png: bytes) -> None:
        """An image for the UI's image grid, at step 0.

        MLflow's log_image gives the files random names, so that an image that is sent again would be there twice.
        """
        stem = f"images/{name.replace('/', '~')}+step+0+timestamp+1+{text_digest(name)[:32]}"
        paths = [f"{stem}.png", f"{stem}+compressed.webp"]

        def keep(spool: Spool) -> None:
            spool.keep(paths[0], png)
            spool.keep(paths[1], _compressed(png))

        self._tell(run, {"op": "files", "paths": paths}, keep)
        self._tell(run, {"op": "tags", "tags": {"mlflow.loggedImages": "True"}})

    def log_model(self, run: str, folder: Path, name: str) -> None:
        """A trained model, by its transformers folder, which has to be there when it is delivered."""
        self._tell(run, {"op": "model", "folder": str(folder.absolute()), "name": name})

    def describe(self, run: str, experiment: str, tags: Mapping[str, str]) -> None:
        """Tags of an experiment; the note is what the UI shows as its description."""
        self._tell(run, {"op": "describe", "experiment": experiment, "tags": dict(tags)})

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """More labels."""
        self._tell(run, {"op": "tags", "tags": {_tag_name(name): value for name, value in tags.items()}})

    def link(self, run: str, other: str, tag: str) -> None:
        """Label another run with the id of this one."""
        self._tell(run, {"op": "link", "other": other, "tag": _tag_name(tag)})

    def finish(self, run: str, status: str) -> None:
        """Close the run; without a good end where something could not be written down, so that the next call tells it again."""
        self._stop_watching(run)
        if status != "FINISHED" or not self._lost:
            self._tell(run, {"op": "finish", "status": status})

    def close(self, patience: float = PATIENCE_SECONDS) -> None:
        """Deliver what is there by now, as long as there is progress, and say what is left.

        Args:
            patience: seconds without progress; fewer where the store does not answer. Where another process delivers,
                there is nothing to wait for.
        """
        for run in list(self._watches):
            self._stop_watching(run)
        delivery = self._delivery
        delivery.decided.wait(SHORT_PATIENCE_SECONDS)
        # The pass that is under way may have passed by what was told last; the next one does not.
        last, steps, since = delivery.passes + 2, delivery.steps, time.monotonic()
        while delivery.holds and delivery.passes < last:
            if delivery.steps != steps:
                steps, since = delivery.steps, time.monotonic()
            if time.monotonic() - since > (min(patience, SHORT_PATIENCE_SECONDS) if delivery.failing else patience):
                break
            delivery.wake()
            time.sleep(_POLL_SECONDS)
        left = waiting(self._folder, self._store) if delivery.holds else 0
        delivery.end()
        delivery.join(timeout=1.0)  # for its lock, which goes unless a call is under way
        if left:
            log.warning(
                "MLflow: %d records wait in %s; the next command on this run directory delivers them, or\n"
                "  distilllens deliver --run-dir %s",
                left, self._folder, self._run_dir,
            )  # fmt: skip

    def _tell(self, run: str, record: Mapping[str, Any], keep: Callable[[Spool], None] = lambda spool: None) -> None:
        """Write a record down, after the files that it names."""
        spool = spool_of(self._folder, run)
        try:
            keep(spool)
            spool.append({"key": run, "time": time.time(), **record})
        except OSError as error:
            self._lost = True
            log.warning(
                "MLflow will not be told the %s of run %s: %s cannot be written (%s)", record["op"], run, spool.folder, error
            )
        self._delivery.wake()

    def _stop_watching(self, run: str) -> None:
        watch = self._watches.pop(run, None)
        if watch is not None:
            watch.stop()


def deliver(run_dir: Path) -> dict[str, int]:
    """Deliver what waits in a run directory, also what was refused before.

    Returns:
        Experiment → how many records still wait or were refused again; those of which nothing waited are left out.
    """
    store, left = without_secrets(configure_mlflow(run_dir)), {}
    for folder in sorted(run_dir.glob("*/mlflow_runs")):
        if not (waiting(folder, store) or refused(folder)):
            continue
        try_refused_again(folder, store)
        with MLflowTracker(run_dir, folder.parent.name):
            pass
        left[folder.parent.name] = waiting(folder, store) + len(refused(folder))
    return left


def _tag_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`; "weight=0.5" becomes "weight:0.5"."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("=", ":"), flags=re.ASCII)


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compressed(png: bytes) -> bytes:
    """The small version that the UI shows first."""
    from mlflow.tracking.multimedia import compress_image_size
    from PIL import Image

    stream = io.BytesIO()
    compress_image_size(Image.open(io.BytesIO(png))).save(stream, format="webp")
    return stream.getvalue()
