"""From the spools to a store: in order, exactly once, by one process and one thread, and never in anybody's way."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import text_digest
from pipeline.errors import ArtifactError
from pipeline.locks import exclusive, lock_path
from pipeline.remote import reason
from pipeline.tracking.mlflow_store import MLflowStore, trials_of
from pipeline.tracking.spool import REFUSED, Progress, Record, Series, Spool, spool_of, spools

log = logging.getLogger(__name__)
POLL_SECONDS = 5.0
"""How often growing files, and what other processes tell, are looked at."""
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0
"""Seconds before a failed delivery is tried again: at first, and at most; doubled in between."""
_LINES = 50  # of a file of metrics in one call
_REFERENCE = re.compile("\x02(run|experiment):([^\x03]*?) *\x03")


class _Unknown(Exception):
    """A record refers to a run that the store does not have yet."""


@dataclass(frozen=True)
class _Box:
    """A spool and how far it was delivered."""

    spool: Spool
    progress: Progress

    def save(self) -> None:
        self.spool.save(self.progress)


class Delivery:
    """Delivers the spools of a folder to a store. Only one may be at work in a folder.

    After any step of it, done or half done, another can go on from what is on disk: progress is written down after the
    step, and a step that is done again leaves the same.
    """

    def __init__(self, folder: Path, store: MLflowStore) -> None:
        self._folder, self._store = folder, store
        self._boxes: dict[Spool, _Box] = {}
        self._failed: Counter[str] = Counter()  # trials of records that may be refused

    def deliver(self) -> Iterator[None]:
        """Deliver what there is, run by run in the order in which they began; gives control back after each step.

        Raises:
            Exception: what the store or a library raised; the same step comes first when this is called again.
        """
        for spool in spools(self._folder, list(self._boxes)):
            if spool not in self._boxes:
                self._boxes[spool] = _Box(spool, spool.progress(self._store.name))
            with contextlib.suppress(_Unknown):  # what it refers to is told by another process, later
                yield from self._deliver(self._boxes[spool])

    def forget_lost(self) -> None:
        """Begin again with runs that the store does not have any more: it was emptied, or is another at the same address."""
        begun = [(spool, next(spool.records())[0], spool.progress(self._store.name)) for spool in spools(self._folder)]
        begun = [each for each in begun if each[2].run_id is not None and "experiment" in each[1]]
        there = {name: self._store.run_ids(name) for name in {str(first["experiment"]) for _, first, _ in begun}}
        for spool, first, progress in begun:
            if progress.run_id not in there[first["experiment"]]:
                spool.save(Progress(spool.key, self._store.name))

    def _deliver(self, box: _Box) -> Iterator[None]:
        unread = box.spool.size() > box.progress.offset
        for record, end in box.spool.records(box.progress.offset) if unread else ():
            yield from self._ship_grown(box)  # steps come before what was told after them
            try:
                if not box.progress.given_up:
                    yield from self._carry_out(box, record)
            except _Unknown:
                raise
            except Exception as error:
                self._set_aside_or_raise(box, record, error)
            box.progress.offset = end
            box.save()
            yield
        yield from self._ship_grown(box)

    def _carry_out(self, box: _Box, record: Record) -> Iterator[None]:
        """What a record asks for."""
        store, progress = self._store, box.progress
        if record["op"] == "start":
            yield from self._start(box, record)
            return
        run_id = progress.run_id or self._adopt(box)
        match record["op"]:
            case "params":
                store.log_params(run_id, record["params"])
            case "inputs":
                store.log_inputs(run_id, record["inputs"])
            case "metrics":
                store.log_metrics(run_id, [{**record, "step": 0}])
            case "points":
                store.log_metrics(run_id, record["points"])
            case "follow":
                progress.series.setdefault(record["series"], Series()).file = record["file"]
            case "steps":
                series = progress.series.setdefault(record["series"], Series())
                series.file = record["file"]
                yield from self._ship(box, series)
                series.file = None
            case "files":
                for path in record["paths"]:
                    store.log_file(run_id, box.spool.files / path, path)
            case "table":
                store.log_file(run_id, box.spool.files / record["path"], record["path"])
                store.show_table(run_id, record["path"])
            case "model":
                store.log_model(run_id, Path(record["folder"]), record["name"])
            case "tags":
                store.set_tags(run_id, self._resolved(record["tags"]))
            case "link":
                other = self._run_id(record["other"])
                if other is not None:
                    store.set_tags(other, {record["tag"]: run_id})
            case "describe":
                store.describe(record["experiment"], self._resolved(record["tags"]))
            case "finish":
                yield from self._finish(box, run_id, record)
            case other:
                raise ValueError(f"no such record: {other}")

    def _start(self, box: _Box, record: Record) -> Iterator[None]:
        if box.progress.run_id is not None:
            self._store.go_on(box.progress.run_id, record)
        else:
            box.progress.run_id = self._store.create(record, self._resolved(record["tags"]))
            box.save()
        box.progress.finished = False
        yield

    def _finish(self, box: _Box, run_id: str, record: Record) -> Iterator[None]:
        for series in box.progress.series.values():
            series.file = None  # all of it was shipped before this record
        first = next(box.spool.records())[0]
        if "experiment" in first:
            self._store.leave_one(first["key"], self._store.experiment(first["experiment"]), run_id)
        self._store.finish(run_id, record["status"], record["time"])
        box.progress.finished = record["status"] == "FINISHED"
        yield

    def _adopt(self, box: _Box) -> str:
        """The run of a spool that does not begin with its start: it was told to an earlier version, or on another disk."""
        found = self._store.find(box.spool.key)
        if found is None:
            raise ValueError("its run was never started")
        box.progress.run_id = found
        return found

    def _ship_grown(self, box: _Box) -> Iterator[None]:
        for series in box.progress.series.values():
            if series.file is not None and not box.progress.given_up:
                yield from self._ship(box, series)

    def _ship(self, box: _Box, series: Series) -> Iterator[None]:
        """Send the lines of a file that were not sent before."""
        assert series.file is not None
        try:
            stream = (box.spool.folder / series.file).open("rb")
        except FileNotFoundError:
            return  # not begun yet, or the finished folder was renamed away
        with stream:
            first = stream.readline()
            if not first.endswith(b"\n"):
                return
            digest = text_digest(first.decode(errors="replace"))[:16]
            if digest != series.first:  # another attempt wrote it anew
                series.first, series.offset, series.skip = digest, 0, series.step
            stream.seek(series.offset)
            lines = [line for line in stream if line.endswith(b"\n")]
        for start in range(0, len(lines), _LINES):
            chunk = lines[start : start + _LINES]
            points = [point for point in map(_point, chunk) if point is not None and point["step"] > series.skip]
            if points:
                assert box.progress.run_id is not None
                try:
                    self._store.log_metrics(box.progress.run_id, points)
                except Exception as error:
                    self._set_aside_or_raise(box, {"op": "points", "points": points}, error)
                series.step = max(series.step, *(int(point["step"]) for point in points))
            series.offset += sum(map(len, chunk))
            box.save()
            yield

    def _resolved(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Tags with ids for references; a tag that is nothing but a reference to a run that there will never be is left out."""
        resolved = {name: _REFERENCE.sub(self._id, value) for name, value in tags.items()}
        return {name: value for name, value in resolved.items() if value or not tags[name]}

    def _id(self, reference: re.Match[str]) -> str:
        kind, name = reference.groups()
        return self._store.experiment(name) if kind == "experiment" else self._run_id(name) or ""

    def _run_id(self, key: str) -> str | None:
        """The id of a run of this folder or of another; None if the store will never have it.

        Raises:
            _Unknown: it does not have it yet.
        """
        progress = spool_of(self._folder, key).progress(self._store.name)
        if progress.run_id is None and not progress.given_up:
            progress.run_id = self._store.find(key)
            if progress.run_id is None:
                raise _Unknown(key)
        return progress.run_id

    def _set_aside_or_raise(self, box: _Box, record: Record, error: Exception) -> None:
        """After enough trials put a record into the file of those that are refused, so that what follows is delivered."""
        self._store.forget()
        trials, what = trials_of(error), json.dumps(record)
        self._failed[what] += trials is not None
        if trials is None or self._failed[what] < trials:
            raise error
        why = reason(error)
        if box.progress.run_id is not None:
            state = self._store.state(box.progress.run_id)
            if state is None:  # the store lost it, and others with it: everything of them is sent again, to new runs
                self._boxes.clear()
                self.forget_lost()
                raise error
            if state == "deleted":
                box.progress.given_up, why = True, "the run was deleted there"
        elif record["op"] == "start":
            box.progress.given_up = True
        box.spool.append({"reason": why, "record": record}, REFUSED)
        refused = "anything more of" if box.progress.given_up else f"the {record['op']} of"
        log.warning("MLflow does not take %s run %s: %s (kept in %s)", refused, box.spool.key, why, box.spool.folder / REFUSED)


class DeliveryThread(threading.Thread):
    """Delivers in the background while this process is the one that delivers from a folder.

    Args:
        folder: of the spools.
        open_store: called by the thread; a database is made, and migrated, here.
    """

    def __init__(self, folder: Path, open_store: Callable[[], MLflowStore]) -> None:
        super().__init__(name="mlflow-delivery", daemon=True)
        self._folder, self._open_store = folder, open_store
        self._ended, self._told = threading.Event(), threading.Event()
        self.decided = threading.Event()
        """Set once it is known whether this process or another delivers."""
        self.holds = False
        """Whether this process delivers."""
        self.failing: str | None = None
        """Why the last attempt failed; None if it did not."""
        self.steps = 0
        """How many steps were delivered."""
        self.passes = 0
        """How often everything that there was had been gone through."""

    def run(self) -> None:
        """Deliver until `end`; where another process delivers, wait for its end."""
        while not self._ended.is_set():
            try:
                with exclusive(lock_path(self._folder), wait_seconds=-1):
                    self.holds = True
                    self.decided.set()
                    self._deliver()
            except ArtifactError:
                self.decided.set()  # another process delivers
            except OSError as error:
                self._fails(error)
            self.holds = False
            self._ended.wait(POLL_SECONDS)

    def wake(self) -> None:
        """There is something to deliver."""
        self._told.set()

    def end(self) -> None:
        """Stop after the step that is under way."""
        self._ended.set()
        self._told.set()

    def _deliver(self) -> None:
        delivery, delay = None, FIRST_DELAY
        while not self._ended.is_set():
            try:
                if delivery is None:
                    opened = Delivery(self._folder, self._open_store())
                    opened.forget_lost()
                    delivery = opened
                for _ in delivery.deliver():
                    self._succeeds()
                    delay = FIRST_DELAY
                    if self._ended.is_set():
                        return
            except Exception as error:  # nothing ends the delivery, which tells of what is in its way
                self._fails(error)
                self._ended.wait(delay)
                delay = min(2 * delay, LONGEST_DELAY)
                continue
            self.passes += 1
            self._told.wait(POLL_SECONDS)
            self._told.clear()

    def _succeeds(self) -> None:
        self.steps += 1
        if self.failing is not None:
            log.warning("MLflow: answers again")
        self.failing = None

    def _fails(self, error: Exception) -> None:
        if self.failing is None:
            log.warning(
                "MLflow: %s; the work goes on, what it tells waits in %s and is delivered later", reason(error), self._folder
            )
        self.failing = reason(error)


def waiting(folder: Path, store: str) -> int:
    """How many records of a folder were not delivered to a store yet."""
    return sum(len(list(spool.records(spool.progress(store).offset))) for spool in spools(folder))


def refused(folder: Path) -> list[Path]:
    """The files of records that a store did not take."""
    return sorted(folder.glob(f"*/{REFUSED}"))


def try_refused_again(folder: Path, store: str) -> None:
    """Tell what was refused once more; of a run that was given up, everything."""
    for path in refused(folder):
        spool = next(spool for spool in spools(folder) if spool.folder == path.parent)
        if spool.progress(store).given_up:
            spool.save(Progress(spool.key, store))
        else:
            for line in path.read_text(encoding="utf-8").splitlines():
                spool.append(json.loads(line)["record"])
        path.unlink()


def _point(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None  # torn when its process was killed
