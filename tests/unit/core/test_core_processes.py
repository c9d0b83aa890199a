from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import processes
from pipeline.processes import Outcome, run_process


def script(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def run(tmp_path: Path, code: str, limit: float | None = None, stop: threading.Event | None = None) -> Outcome:
    return run_process(script(code), tmp_path / "log.txt", {"MARK": "here"}, limit, stop or threading.Event())


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


CHILD = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"


def test_output_and_exit_code_are_kept(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("before\n")
    outcome = run(tmp_path, "import os, sys; print(os.environ['MARK']); print('bad', file=sys.stderr); sys.exit(3)")
    assert (outcome.code, outcome.timed_out, outcome.stopped) == (3, False, False)
    assert (tmp_path / "log.txt").read_text().split() == ["before", "here", "bad"]


def test_a_signal_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, "import os; os.kill(os.getpid(), 9)").code == -signal.SIGKILL


def test_the_time_limit_ends_it_politely(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up'); time.sleep(600)"
    outcome = run(tmp_path, code, limit=1.0)
    assert (outcome.code, outcome.timed_out, outcome.stopped) == (7, True, False)


def test_what_does_not_listen_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    outcome = run(tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)", limit=1.0)
    assert (outcome.code, outcome.timed_out) == (-signal.SIGKILL, True)


def test_a_request_to_stop_ends_it(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    outcome = run(tmp_path, "import time; time.sleep(600)", stop=stop)
    assert (outcome.code, outcome.stopped, outcome.timed_out) == (-signal.SIGTERM, True, False)


def test_children_of_an_ended_process_are_ended(tmp_path: Path) -> None:
    assert run(tmp_path, CHILD).code == 0
    child = int((tmp_path / "log.txt").read_text())
    assert wait_for(lambda: not alive(child))


def test_it_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    inner = (
        "import os, time; from pipeline.processes import die_with_parent; die_with_parent(); "
        "print(os.getpid()); time.sleep(600)"
    )
    outer = (
        "import sys, threading; from pathlib import Path; from pipeline.processes import run_process; "
        f"log = Path({str(tmp_path / 'inner.txt')!r}); "
        f"run_process([sys.executable, '-u', '-c', {inner!r}], log, {{}}, None, threading.Event())"
    )
    parent = subprocess.Popen(script(outer), cwd=Path(__file__).resolve().parents[3])
    log = tmp_path / "inner.txt"
    assert wait_for(lambda: log.exists() and log.read_text().endswith("\n"), 60)
    child = int(log.read_text())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: not alive(child))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_in_a_finaliser_is_not_lost(number: int, code: int) -> None:
    """Python drops what is raised there."""
    program = f"""
import os, signal, time
from pipeline.processes import exit_on_sigterm
signal.signal(signal.SIGINT, signal.default_int_handler)
exit_on_sigterm()
class Held:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.01)
held = Held()
del held
print("not ended there", flush=True)
time.sleep(60)
print("not ended at all", flush=True)
"""
    done = subprocess.run(script(program), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (code, "not ended there\n"), done.stderr


def test_other_errors_in_finalisers_are_told_as_ever() -> None:
    program = """
from pipeline.processes import exit_on_sigterm
exit_on_sigterm()
class Held:
    def __del__(self):
        raise ValueError("told")
held = Held()
del held
"""
    done = subprocess.run(script(program), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "ValueError: told" in done.stderr
