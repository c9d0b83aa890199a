"""Locks: a dead owner's lock is taken over by one process, however many wait for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import locks
from pipeline.errors import ArtifactError
from pipeline.locks import exclusive, held, lock_path

# Every holder dies inside, so that every turn is a take-over, with the other workers waiting for the same one; what they
# know of the owner grows old before they act on it.
DIE_INSIDE = """
import os, random, sys, time
from pathlib import Path
from pipeline import locks

locks._POLL_SECONDS = 0.0005
alive = locks._alive

def slow(owner):
    found = alive(owner)
    time.sleep(0.004 * random.random())
    return found

locks._alive = slow
lock, journal, turns = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def say(word):
    with journal.open("a") as stream:
        stream.write(f"{word} {os.getpid()}\\n")

for _ in range(turns):
    child = os.fork()
    if child == 0:
        with locks.exclusive(lock):
            say("enter")
            time.sleep(0.001)
            say("leave")
            os._exit(0)
    os.waitpid(child, 0)
"""

END = """
with locks.exclusive(lock):
    os._exit(0)
"""


def test_never_are_two_inside_though_every_owner_dies(tmp_path: Path) -> None:
    workers, turns = 6, 20
    command = [sys.executable, "-c", DIE_INSIDE, str(tmp_path / "l"), str(tmp_path / "journal"), str(turns)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(workers)]
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), errors
    entries = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
    assert len(entries) == 2 * workers * turns
    for (entered, owner), (left, same) in zip(entries[::2], entries[1::2], strict=True):
        assert (entered, left) == ("enter", "leave") and owner == same
    with exclusive(tmp_path / "l", wait_seconds=0):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["journal"]


def test_a_lock_taken_since_the_owner_was_judged_dead_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / "l"
    dead: dict[str, object] = {"pid": 1, "start": "0", "host": "elsewhere"}
    with exclusive(lock):
        mine = lock.read_text()
        locks._remove_dead(lock, dead)
        assert lock.read_text() == mine
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_while_it_takes_over_does_not_block_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "l"
    with exclusive(lock):
        content = json.loads(lock.read_text())
    lock.write_text(json.dumps({**content, "start": "1"}))
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: os._exit(0))  # dies with the lock of the take-over in its hands
        monkeypatch.setattr(locks, "_try_take", lambda path: (path.write_text(json.dumps(content | {"start": "2"})), True)[1])
        locks._remove_dead(lock, {**content, "start": "1"})
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.iterdir())) == 2
    with exclusive(lock, wait_seconds=0):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_held_says_whether_a_living_process_has_it(tmp_path: Path) -> None:
    lock = lock_path(tmp_path / "artifact")
    assert lock.name == "artifact.lock" and not held(lock)
    with exclusive(lock):
        assert held(lock)
        content = json.loads(lock.read_text())
    assert not held(lock)
    lock.write_text(json.dumps({**content, "start": "1"}))
    assert not held(lock)


def test_a_process_that_ended_and_was_not_reaped_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "l"
    process = subprocess.Popen([sys.executable, "-c", DIE_INSIDE.partition("for _")[0] + END, str(lock), "-", "0"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert json.loads(lock.read_text())["pid"] == process.pid
    with exclusive(lock, wait_seconds=0):
        pass
    process.wait()


def dead(lock: Path, **changes: object) -> None:
    """The lock of a process that is gone, or as changed."""
    lock.write_text(json.dumps({"pid": os.getpid(), "start": "1", "host": socket.gethostname(), **changes}))


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the client repeats the request, and is told that the name exists."""
    link = os.link

    def repeated(old: Path, new: Path) -> None:
        link(old, new)
        link(old, new)

    monkeypatch.setattr(os, "link", repeated)
    with exclusive(tmp_path / "l", wait_seconds=0):
        assert held(tmp_path / "l")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_the_age_of_a_lock_plays_no_role_whatever_the_clock_says(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now = tmp_path / "l", time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    lock.write_text(json.dumps({"pid": os.getppid(), "start": locks._start_time(os.getppid()), "host": socket.gethostname()}))
    os.utime(lock, (now - jump, now - jump))
    with pytest.raises(ArtifactError, match=f"held by process {os.getppid()} on"):
        exclusive(lock, wait_seconds=0).__enter__()
    dead(lock)
    os.utime(lock, (now - jump, now - jump))
    with exclusive(lock, wait_seconds=0):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_the_same_process_number_and_time_of_another_boot_is_another_process(tmp_path: Path) -> None:
    started = locks._start_time(os.getpid())
    assert started is not None and started.endswith(f"@{locks._boot()}")
    dead(tmp_path / "l", start=started)
    assert held(tmp_path / "l")
    dead(tmp_path / "l", start=started.partition("@")[0] + "@another")
    assert not held(tmp_path / "l")


def test_a_process_may_have_any_name() -> None:
    name = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'gr\\xf6 ) Z 1'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert locks._start_time(process.pid) is not None
        assert process.stdin is not None
        process.stdin.close()


def test_a_process_that_may_not_be_looked_at_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may hide the processes of other users."""
    real = Path.read_bytes

    def hidden(path: Path) -> bytes:
        if path.name == "stat":
            raise FileNotFoundError
        return real(path)

    def refuse(pid: int, number: int) -> None:
        raise PermissionError if pid == 77 else ProcessLookupError

    monkeypatch.setattr(Path, "read_bytes", hidden)
    monkeypatch.setattr(os, "kill", refuse)
    dead(tmp_path / "l", pid=77)
    assert held(tmp_path / "l")
    dead(tmp_path / "l", pid=78)
    assert not held(tmp_path / "l")


@pytest.mark.parametrize("pid", [0, -1, 10**30, None, "1"])
def test_a_number_that_no_process_has_holds_nothing(pid: object, tmp_path: Path) -> None:
    dead(tmp_path / "l", pid=pid, start=None)
    with exclusive(tmp_path / "l", wait_seconds=0):
        assert json.loads((tmp_path / "l").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_never_taken(tmp_path: Path) -> None:
    dead(tmp_path / "l", host="elsewhere")
    assert held(tmp_path / "l")
    with pytest.raises(ArtifactError, match="on elsewhere; wait for it to end, or remove the file if it is gone"):
        exclusive(tmp_path / "l", wait_seconds=0).__enter__()
