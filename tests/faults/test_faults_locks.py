"""Two runs in one run directory, and the locks of processes that are gone."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

import pytest
from faults_results import differences, results
from faults_run import CONTEXT, Process
from faults_setup import ALL, Tally, Undisturbed

from pipeline import locks
from pipeline.errors import ArtifactError
from pipeline.locks import exclusive


@pytest.mark.parametrize("delay", (0.0, 0.7, 2.0) if ALL else ())
def test_two_runs_at_once_do_everything_once(delay: float, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    first = Process(undisturbed.folder, tmp_path / "runs", tmp_path / "scratch")
    time.sleep(delay)
    second = Process(undisturbed.folder, tmp_path / "runs", tmp_path / "scratch")
    ended = [first.wait(), second.wait()]
    what = "\n".join(end.log for end in ended if end.code != 0) or differences(undisturbed.results, results(tmp_path / "runs"))
    done = {kind: sum(end.work.get(kind, 0) for end in ended) for kind in undisturbed.work}
    what = what or ("" if done == undisturbed.work else f"{done} done, {undisturbed.work} needed")
    tally("two runs in one directory", not what, what)


def _die_with_lock(path: Path) -> None:
    with exclusive(path):
        os._exit(0)


def owner(pid: int, start: str | None, host: str | None = None) -> str:
    return json.dumps({"pid": pid, "start": start, "host": host or socket.gethostname()})


@pytest.mark.parametrize("flock", [True, False], ids=["", "without flock"])
@pytest.mark.parametrize("case", ["died", "its id is another process's now", "no such process"])
def test_the_lock_of_a_dead_process_is_taken_over(
    case: str, flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    lock = tmp_path / "x.lock"
    if case == "died":
        process = CONTEXT.Process(target=_die_with_lock, args=(lock,))
        process.start()
        process.join()
    else:
        lock.write_text(owner(os.getpid(), "1") if "another" in case else owner(2**22 + 1, "1"))
    assert lock.exists()
    if not flock:  # as on NFS without its lock service
        for name in ("flock", "lockf", "fcntl"):
            monkeypatch.setattr(fcntl, name, lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with exclusive(lock, wait_seconds=0):
        mine = json.loads(lock.read_text())
    tally("lock of a dead process", mine["pid"] == os.getpid() and not lock.exists(), str(mine))


@pytest.mark.parametrize("host", ["this one", "another"])
def test_a_living_owner_is_waited_for_and_named(host: str, tmp_path: Path, tally: Tally) -> None:
    lock = tmp_path / "x.lock"
    start = locks._start_time(os.getppid())
    content = owner(os.getppid(), start) if host == "this one" else owner(1, "1", "elsewhere")
    lock.write_text(content)
    with pytest.raises(ArtifactError, match=r"x\.lock: held by process \d+ on .*; wait for it to end"):
        exclusive(lock, wait_seconds=0).__enter__()
    tally("lock of a living process", lock.read_text() == content, "the lock was taken from it")
