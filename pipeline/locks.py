"""One writer at a time, without flock: a lock file that names its owner, and a check whether that owner still lives.

An owner is a process of a machine, told from later ones with its id by the kernel's start time. The age of a lock plays no
role, and waiting is timed by the monotonic clock, so a clock that jumps changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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
_UNKNOWN = "unknown"


def lock_path(path: Path) -> Path:
    """The lock file of an artifact's place."""
    return path.with_name(path.name + ".lock")


def held(path: Path) -> bool:
    """Whether a living process holds the lock file `path`."""
    owner = _read_owner(path)
    return owner is not None and _alive(owner)


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
            _remove_dead(path, owner)
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
        # NFS repeats a request whose answer was lost, and the second one meets what the first one made.
        return mine.stat().st_nlink == 2
    finally:
        mine.unlink()
    return True


def _read_owner(path: Path) -> dict[str, object] | None:
    try:
        owner = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _alive(owner: dict[str, object]) -> bool:
    if owner.get("host") != socket.gethostname():
        return True  # another machine's process cannot be looked at from here
    pid = owner.get("pid")
    found = _start_time(pid) if isinstance(pid, int) and pid > 0 else None
    return found is not None and found in (owner.get("start"), _UNKNOWN)


def _remove_dead(path: Path, owner: dict[str, object]) -> None:
    """Remove the lock of a dead owner, of which several waiting processes may know at the same time.

    Under a lock named after that owner: only its holder may remove the owner's lock, so what is read here is still there
    when it is removed, and a lock that a third process has taken since is never touched. A process that dies right here
    leaves that lock to be removed in the same way.
    """
    name = hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:12]
    with exclusive(path.with_name(f"{path.name}.{name}")):
        if _read_owner(path) == owner:
            path.unlink()
            log.warning("took over %s from the dead process %s", path, owner.get("pid"))


def this_process() -> str:
    """Host, process id and the kernel's start time, which tells a process from a later one with the same id."""
    return f"{socket.gethostname()} {os.getpid()} {_start_time(os.getpid())}"


def is_gone(process: str) -> bool:
    """Whether a process, as `this_process` named it, has ended; one of another machine counts as alive."""
    host, pid, start = process.rsplit(" ", 2)
    return host == socket.gethostname() and _start_time(int(pid)) not in (start, _UNKNOWN)


def _start_time(pid: int) -> str | None:
    """Kernel start time of a process: jiffies since boot, and which boot.

    None if there is no such process or it only waits to be reaped; `_UNKNOWN` if existence is all that can be told.
    """
    try:
        # Bytes: a process may have any name, and the kernel cuts it anywhere.
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
        return None if state[0] in "ZX" else f"{state[19]}@{_boot()}"
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass
    try:  # no procfs, or one that hides the processes of other users
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return _UNKNOWN


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _describe(owner: dict[str, object] | None) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
