"""One writer at a time, without flock: a lock file that names its owner, and a check whether that owner still lives."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ArtifactError

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def exclusive(path: Path, wait_seconds: float = 24 * 3600) -> Iterator[None]:
    """Hold the lock file `path`; wait for a living owner, take over from a dead one.

    Raises:
        ArtifactError: a living owner kept it longer than `wait_seconds`.
    """
    deadline, told = time.monotonic() + wait_seconds, False
    while not _try_take(path):
        owner = _read_owner(path)
        if owner is not None and not _alive(owner):
            _steal(path, owner)
            continue
        if time.monotonic() > deadline:
            raise ArtifactError(f"{path}: held by {_describe(owner)}; wait for it to end, or remove the file if it is gone")
        if not told:
            log.info("waiting for %s, which works on %s", _describe(owner), path.stem)
            told = True
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _try_take(path: Path) -> bool:
    # The complete content is linked into place, so that no reader ever sees an empty lock.
    mine = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    mine.write_text(json.dumps({"pid": os.getpid(), "start": _start_time(os.getpid()), "host": socket.gethostname()}))
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True


def _read_owner(path: Path) -> dict[str, object] | None:
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return owner if isinstance(owner, dict) else None


def _alive(owner: dict[str, object]) -> bool:
    if owner.get("host") != socket.gethostname():
        return True  # another machine's process cannot be looked at from here
    pid = owner.get("pid")
    return isinstance(pid, int) and _start_time(pid) is not None and _start_time(pid) == owner.get("start")


def _steal(path: Path, owner: dict[str, object]) -> None:
    # Rename first: of several waiting processes only one wins, and a lock taken meanwhile is put back by its check.
    grave = path.with_name(f"{path.name}.stale.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, grave)
        if _read_owner(grave) != owner:
            os.link(grave, path)
        else:
            log.warning("took over %s from the dead process %s", path, owner.get("pid"))
        grave.unlink()


def _start_time(pid: int) -> str | None:
    """Kernel start time of a process (jiffies since boot), None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass
    if Path("/proc/self").exists():
        return None
    try:  # no procfs: existence is all that can be told
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _describe(owner: dict[str, object] | None) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
