"""What was told about a run, on disk until a server has it: records in order, their files, and how far they were delivered.

    FOLDER/ID.json            how far; written by the process that delivers
    FOLDER/ID/records.jsonl   one record a line, appended by the process that works on the run
    FOLDER/ID/files/          files that records name, laid out as the run's artifacts
    FOLDER/ID/*.jsonl         metrics by step
    FOLDER/ID/refused.jsonl   records that the server does not take, with its reasons

A record is in the hands of the kernel when `append` returns, so that SIGKILL loses none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import text_digest

Record = dict[str, Any]
RECORDS, REFUSED = "records.jsonl", "refused.jsonl"


@dataclass
class Series:
    """How far a file of metrics by step was delivered.

    Attributes:
        file: where it is, relative to the run's folder or absolute; None once all of it is delivered.
        first: digest of its first line, which tells it from that of another attempt.
        offset: bytes that were delivered.
        step: last step that was.
        skip: steps up to this one were delivered from the file of an earlier attempt, with other times.
    """

    file: str | None = None
    first: str = ""
    offset: int = 0
    step: int = -1
    skip: int = -1


@dataclass
class Progress:
    """How far a run was delivered to one store.

    Attributes:
        key: the run's.
        uri: the store's, without a password.
        run_id: the run's there, once it has one.
        offset: bytes of records that were delivered or set aside.
        finished: whether it was closed as FINISHED there.
        given_up: whether the store takes nothing of this run.
        series: its metrics by step, by name.
    """

    key: str
    uri: str
    run_id: str | None = None
    offset: int = 0
    finished: bool = False
    given_up: bool = False
    series: dict[str, Series] = field(default_factory=dict)


@dataclass(frozen=True)
class Spool:
    """The records of one run.

    Attributes:
        folder: its own.
        key: the run's.
        begun: when the first of them was told, seconds since the epoch.
    """

    folder: Path
    key: str
    begun: float = 0.0

    @property
    def files(self) -> Path:
        """Where its files are."""
        return self.folder / "files"

    def append(self, record: Mapping[str, Any], file: str = RECORDS) -> None:
        """Add a record to a file, in one write.

        Raises:
            OSError: the disk cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        line = f"{json.dumps(record)}\n".encode()
        descriptor = os.open(self.folder / file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # what a killed process left of a line ends here, and is a line that nobody reads
            while line:
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)

    def records(self, offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Every whole record behind `offset`, with the offset behind it; a torn line is none."""
        try:
            stream = (self.folder / RECORDS).open("rb")
        except FileNotFoundError:
            return
        with stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                    record = json.loads(line)
                    if isinstance(record, dict) and record.keys() >= {"op", "key", "time"}:
                        yield record, offset

    def size(self) -> int:
        """Bytes of records."""
        return (self.folder / RECORDS).stat().st_size

    def status(self) -> str | None:
        """The last that was told: RUNNING, or how it ended; None if that was never told here."""
        told = [record.get("status", "RUNNING") for record, _ in self.records() if record["op"] in ("start", "finish")]
        return told[-1] if told else None

    def figures(self) -> dict[str, float]:
        """The last value that was told of each final figure."""
        found: dict[str, float] = {}
        for record, _ in self.records():
            found |= record["metrics"] if record["op"] == "metrics" else {}
        return found

    def keep(self, path: str, content: Path | bytes) -> None:
        """Have a file under `files`/`path`: bytes, or what another file holds now, by a second name where that is possible."""
        target = self.files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(content, target)

    def keep_beside(self, name: str, content: Path) -> None:
        """Have what a file holds now beside the records."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _place(content, self.folder / name)

    def progress_path(self) -> Path:
        """Where its progress is written down."""
        return self.folder.with_suffix(".json")

    def progress(self, store: str) -> Progress:
        """How far it was delivered to a store."""
        try:
            known = json.loads(self.progress_path().read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            known = {}
        if not isinstance(known, dict) or known.get("uri") != store:
            return Progress(self.key, store)
        series = {name: Series(**values) for name, values in known.pop("series", {}).items()}
        return Progress(**known, series=series)

    def save(self, progress: Progress) -> None:
        """Write it down, whole or not at all."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _place(json.dumps(asdict(progress)).encode(), self.progress_path())


def spool_of(folder: Path, key: str) -> Spool:
    """The spool of the run with a key."""
    return Spool(folder / text_digest(key)[:16], key)


def spools(folder: Path, known: Collection[Spool] = ()) -> list[Spool]:
    """Every spool that has a record, in the order in which their runs began; `known` are not read again."""
    found = {spool.folder: spool for spool in known}
    for path in folder.glob(f"*/{RECORDS}"):
        if path.parent not in found:
            first = next((record for record, _ in Spool(path.parent, "").records()), None)
            if first is not None:
                found[path.parent] = Spool(path.parent, first["key"], first["time"])
    return sorted(found.values(), key=lambda spool: (spool.begun, spool.key))


def _place(content: Path | bytes, target: Path) -> None:
    """A reader sees the old content or the new; a file that is replaced later keeps what it had here."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        temporary.unlink(missing_ok=True)
        try:
            os.link(content, temporary)
        except OSError:  # another file system, or one without second names
            shutil.copyfile(content, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # two names of one file stay where they are
