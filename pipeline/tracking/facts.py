"""What is told about a run, and to whom: facts as plain data, and the protocol that callers see."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import PipelineError

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
        tags: labels to filter and group by; values may hold references (see `run_reference`).
        inputs: data sets.
    """

    key: str
    name: str
    experiment: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    inputs: Sequence[DataInput] = ()


def run_reference(run: str) -> str:
    """Stands for a run's id in a tag or a description, until the server has given it one."""
    # Control characters occur in no name and no Markdown; as wide as an id, so that a text that fits still does with it.
    return f"\x02run:{run:<32}\x03"


def experiment_reference(name: str) -> str:
    """Stands for an experiment's id, likewise."""
    return f"\x02experiment:{name:<20}\x03"


class Tracker(Protocol):
    """Receives facts. Every run is named by the handle that `start` gave, and no call waits for a server."""

    def told(self, key: str) -> str | None:
        """The handle of the run with this key if it was told to its good end before; what is left of it is delivered."""
        ...

    def start(self, run: RunFacts) -> str:
        """Begin the run, or go on with it; returns its handle."""
        ...

    def follow(self, run: str) -> Callable[[Path], None]:
        """A function that is told where metrics.jsonl is, which is shipped while it grows, until `finish`."""
        ...

    def log_metrics(self, run: str, metrics: Mapping[str, float]) -> None:
        """Final figures, without a step."""
        ...

    def log_steps(self, run: str, metrics_file: Path) -> None:
        """Everything in a finished metrics.jsonl that was not shipped yet."""
        ...

    def log_files(self, run: str, files: Sequence[Path], folder: str) -> None:
        """Files and folders, under an artifact folder of the run."""
        ...

    def log_table(self, run: str, rows: Mapping[str, Sequence[Any]], file: str) -> None:
        """A table that the UI can show, columns by name."""
        ...

    def log_image(self, run: str, name: str, png: bytes) -> None:
        """An image; those of the same name in several runs are shown side by side."""
        ...

    def log_model(self, run: str, folder: Path, name: str) -> None:
        """A trained model, by its transformers folder."""
        ...

    def describe(self, run: str, experiment: str, tags: Mapping[str, str]) -> None:
        """Labels of a whole experiment, its description among them, as a part of what `run` found; may hold references."""
        ...

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """More labels; values may hold references."""
        ...

    def link(self, run: str, other: str, tag: str) -> None:
        """Label another run, which another process may be telling about, with the id of this one."""
        ...

    def finish(self, run: str, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        ...


class NoTracker:
    """Tracks nothing."""

    def told(self, key: str) -> str | None:
        """See `Tracker`."""
        return None

    def start(self, run: RunFacts) -> str:
        """See `Tracker`."""
        return run.key

    def follow(self, run: str) -> Callable[[Path], None]:
        """See `Tracker`."""
        return lambda path: None

    def log_metrics(self, run: str, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""

    def log_steps(self, run: str, metrics_file: Path) -> None:
        """See `Tracker`."""

    def log_files(self, run: str, files: Sequence[Path], folder: str) -> None:
        """See `Tracker`."""

    def log_table(self, run: str, rows: Mapping[str, Sequence[Any]], file: str) -> None:
        """See `Tracker`."""

    def log_image(self, run: str, name: str, png: bytes) -> None:
        """See `Tracker`."""

    def log_model(self, run: str, folder: Path, name: str) -> None:
        """See `Tracker`."""

    def describe(self, run: str, experiment: str, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""

    def link(self, run: str, other: str, tag: str) -> None:
        """See `Tracker`."""

    def finish(self, run: str, status: str) -> None:
        """See `Tracker`."""


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
def tracked(tracker: Tracker, run: str) -> Iterator[None]:
    """Mark the run FAILED or KILLED if the body does not end well; ending it well is left to the caller."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tracker.finish(run, "KILLED")
        raise
    except PipelineError as error:
        tracker.finish(run, "KILLED" if error.exit_code == 128 + signal.SIGTERM else "FAILED")
        raise
    except BaseException:
        tracker.finish(run, "FAILED")
        raise


def stage_experiment(experiment: str) -> str:
    """Name of the sibling experiment of stage runs; kept apart so that they do not hide the trials."""
    return f"{experiment} · stages"
