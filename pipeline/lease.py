"""One holder among machines: a lease that is renewed while its holder works and can be taken over once renewals stop.

A lease is a folder of numbered files. Whoever creates the highest number holds it until that file says that it is
released, or has not changed for its lifetime by the *watcher's own* monotonic clock; then the next number may be
created. Creating a file that no one else has is the only thing that must be atomic, so no two processes can take over
the same lease, and clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ArtifactError
from pipeline.remote import RemoteFolder, reason

log = logging.getLogger(__name__)
LIFETIME_SECONDS = 120.0
"""Renewed every third of it; a holder that is killed blocks the others for so long."""
_POLL_SECONDS = 5.0
Wait = Literal["end", "sign", "never"]
"""How long to wait for a holder: until it ends or falls silent, until it gives a sign of life, or not at all."""
_NUMBER = re.compile(r"(\d{6,})\.json")


class LeaseLost(ArtifactError):
    """Another process took the lease over, because this one could not renew it in time."""


@dataclass(frozen=True)
class Lease:
    """A lease that this process took.

    Attributes:
        folder: the remote folder.
        where: the lease's folder in it.
        number: of the file that this process created there.
        token: names the holder; random.
        lifetime: seconds without a renewal after which others may take it over.
    """

    folder: RemoteFolder
    where: str
    number: int
    token: str
    lifetime: float

    def check(self) -> None:
        """Make sure that this process still holds it.

        Raises:
            LeaseLost: another took it over.
        """
        number, content = _newest(self.folder, self.where)
        if content.get("token") != self.token:
            raise LeaseLost(
                f"{self.folder.shown}/{self.where}: taken over by {_describe(content)} (number {number}), because this process "
                f"did not renew it for {self.lifetime:g} seconds (was the machine asleep or cut off?); run again to take "
                "what the other made"
            )

    def write(self, beat: int, released: bool = False) -> None:
        """Renew it, or let it go."""
        self.folder.write(_name(self.where, self.number), self.content(beat, released))

    def content(self, beat: int, released: bool = False) -> bytes:
        """What the file says; `beat` only has to change."""
        return json.dumps(
            {
                "host": socket.gethostname(), "pid": os.getpid(), "token": self.token, "lifetime": self.lifetime,
                "beat": beat, "released": released,
            }
        ).encode()  # fmt: skip


@contextlib.contextmanager
def hold(folder: RemoteFolder, where: str, lifetime: float, wait: Wait = "end") -> Iterator[Lease | None]:
    """Hold the lease at `where`, renewed by a thread; None if another holds it and `wait` is over.

    Args:
        folder: the remote folder.
        where: the lease's folder in it.
        lifetime: seconds, see `Lease`.
        wait: for whom holds it; after "end" there is always a lease.
    """
    lease = _acquire(folder, where, lifetime, wait)
    if lease is None:
        yield None
        return
    stop = threading.Event()
    renewal = threading.Thread(target=_renew, args=(lease, stop), name=f"lease {where}", daemon=True)
    renewal.start()
    try:
        yield lease
    finally:
        stop.set()
        renewal.join()
        _release(lease)


def clear(folder: RemoteFolder, where: str) -> None:
    """Remove a lease for good, once nothing depends on it any more."""
    for name in folder.names(where):
        folder.remove(f"{where}/{name}")


def _acquire(folder: RemoteFolder, where: str, lifetime: float, wait: Wait) -> Lease | None:
    watched: tuple[int, dict[str, Any]] | None = None
    since, told = time.monotonic(), False
    while True:
        number, content = found = _newest(folder, where)
        sign = watched is not None and found != watched
        if found != watched:
            watched, since = found, time.monotonic()
        allowed = float(content.get("lifetime", lifetime))
        free = number == 0 or content.get("released") is True
        if free or time.monotonic() - since > allowed:
            lease = Lease(folder, where, number + 1, secrets.token_hex(16), lifetime)
            if folder.create(_name(where, lease.number), lease.content(0)):
                _clear_below(folder, where, lease.number)
                if not free:
                    log.warning("took over %s/%s from %s, which fell silent", folder.shown, where, _describe(content))
                return lease
            continue
        if wait == "never" or (wait == "sign" and sign):
            return None
        if not told:
            log.info("waiting for %s, which works on %s", _describe(content), where.removesuffix(".lease"))
            told = True
        time.sleep(min(_POLL_SECONDS, allowed / 6))


def _renew(lease: Lease, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(lease.lifetime / 3):
        beat += 1
        try:
            lease.check()
            lease.write(beat)
        except LeaseLost as error:
            log.warning("%s", error)
            return
        # Whatever a client library raises while the store is out of reach: the next turn tries again, and in the end `check`
        # decides.
        except Exception as error:
            log.warning("cannot renew %s/%s (%s); trying again", lease.folder.shown, lease.where, reason(error))


def _release(lease: Lease) -> None:
    try:
        lease.check()
        lease.write(-1, released=True)
    except LeaseLost:
        pass  # nothing to let go; whoever depends on the lease has asked `check`
    # The work's own outcome is what counts; a lease that cannot be let go ends by itself.
    except Exception as error:
        log.warning("cannot release %s/%s (%s); it ends by itself", lease.folder.shown, lease.where, reason(error))


def _clear_below(folder: RemoteFolder, where: str, number: int) -> None:
    for older in _numbers(folder, where):
        if older < number:
            folder.remove(_name(where, older))


def _numbers(folder: RemoteFolder, where: str) -> list[int]:
    return [int(match[1]) for name in folder.names(where) if (match := _NUMBER.fullmatch(name))]


def _newest(folder: RemoteFolder, where: str) -> tuple[int, dict[str, Any]]:
    """Highest number and what its file says ({} while it is being written); 0 if there is none."""
    numbers = _numbers(folder, where)
    if not numbers:
        return 0, {}
    try:
        content = json.loads(folder.read(_name(where, max(numbers))) or b"{}")
    except ValueError:
        content = {}
    return max(numbers), content if isinstance(content, dict) else {}


def _name(where: str, number: int) -> str:
    return f"{where}/{number:06d}.json"


def _describe(content: dict[str, Any]) -> str:
    return f"process {content.get('pid')} on {content.get('host')}" if content else "another process"
