"""Starting the processes that train together, on this machine, and waiting for them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import errors
from pipeline.errors import PipelineError, TrainingError
from pipeline.training.sharded import Division, Sharding, Zero
from pipeline.training.stopping import StopAsked, Stopped, stop_on_sigterm

log = logging.getLogger(__name__)
_FOLDER, _JOB = "processes", "job.json"
_LAST_LINES = 8
_POLL_SECONDS = 0.1


class ProcessLost(TrainingError):
    """A process died of something that says nothing about the training: killed, out of memory, a bug."""


@dataclass(frozen=True)
class Job:
    """What every process is told, as JSON.

    Attributes:
        entry: module with `run_rank(task, folder, group, stop)`.
        task: for the entry.
        folder: where the work goes; the parent holds its lock.
        processes: how many.
        division: how they divide the model; None replicates it.
        rendezvous: a file on a local disk, not there yet.
        parent: process id; the processes end when it does.
    """

    entry: str
    task: str
    folder: Path
    processes: int
    division: Division | None
    rendezvous: Path
    parent: int

    @staticmethod
    def read(path: Path) -> Job:
        """A job from its file."""
        found = json.loads(path.read_text(encoding="utf-8"))
        division = found["division"]
        if division is not None:
            found["division"] = Zero(**division) if "options" in division else Sharding(**division)
        return Job(**{**found, "folder": Path(found["folder"]), "rendezvous": Path(found["rendezvous"])})

    def write(self, path: Path) -> None:
        """Write the file that `read` reads."""
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")


def failure_file(folder: Path, rank: int) -> Path:
    """Where a process says which error ended it."""
    return folder / _FOLDER / f"failure-{rank}.json"


def forget(folder: Path) -> None:
    """Remove what processes left there: logs and word of failures."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def log_file(folder: Path, rank: int) -> Path:
    """What a process wrote to its standard output and error."""
    return folder / _FOLDER / f"rank-{rank}.log"


def run_processes(entry: str, task: str, folder: Path, processes: int, division: Division | None, label: str) -> None:
    """Run a job's entry in several processes at once; what the first one logs is logged here.

    SIGTERM and Ctrl-C are passed on and the processes waited for. When this process dies, they do.

    Args:
        entry: see `Job`, like the next four.
        task: for the entry.
        folder: where the work goes.
        processes: how many.
        division: how they divide the model; None replicates it.
        label: for messages.

    Raises:
        PipelineError: the one that ended a process, if it is one of `pipeline.errors`.
        ProcessLost: a process ended otherwise; the message has its log's last lines.
        Stopped: they were asked to stop.
    """
    forget(folder)
    (folder / _FOLDER).mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="processes-") as meeting, stop_on_sigterm() as asked:
        job = Job(entry, task, folder.resolve(), processes, division, Path(meeting) / "rendezvous", os.getpid())
        file = folder / _FOLDER / _JOB
        job.write(file)
        started: list[subprocess.Popen[bytes]] = []
        try:
            started += [_start(file, folder, rank, processes) for rank in range(processes)]
            codes = _wait(started, asked, _Relay(log_file(folder, 0)))
        finally:
            for process in started:
                process.kill()
                process.wait()
    _check(codes, folder, label, asked())
    forget(folder)


def _start(job: Path, folder: Path, rank: int, processes: int) -> subprocess.Popen[bytes]:
    with log_file(folder, rank).open("wb") as output:
        # -P: the working directory is not searched for modules. A session of its own: Ctrl-C reaches the parent alone.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.training.worker", str(job), str(rank)],
            env=_environment(rank, processes), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def _environment(rank: int, processes: int) -> dict[str, str]:
    source = str(Path(errors.__file__).resolve().parent.parent)
    given = os.environ.get("PYTHONPATH")
    threads = max(1, (os.cpu_count() or 1) // processes)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    # They are all on this machine, and nobody else is to talk to them.
    loopback = {f"{library}_SOCKET_IFNAME": "lo" for library in ("GLOO", "NCCL")} if sys.platform == "linux" else {}
    return {
        "OMP_NUM_THREADS": str(threads),
        **loopback,
        **os.environ,
        **{name: str(value) for name, value in ranks.items()},
        "PYTHONPATH": f"{source}{os.pathsep}{given}" if given else source,
    }


def _wait(started: Sequence[subprocess.Popen[bytes]], asked: StopAsked, relay: _Relay) -> list[int | None]:
    """Return when all have ended or one has failed; their exit codes, None for those that still run."""
    told = interrupted = False
    while any(process.poll() is None for process in started):
        try:
            if (interrupted or asked()) and not told:
                told = True
                for process in started:
                    process.send_signal(signal.SIGTERM)
            relay.lines()
            if any(process.returncode not in (None, 0, Stopped.exit_code) for process in started):
                break
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
    codes = [process.poll() for process in started]
    relay.lines()
    if interrupted:
        raise KeyboardInterrupt
    return codes


def _check(codes: Sequence[int | None], folder: Path, label: str, asked: bool) -> None:
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return
    if asked and {codes[rank] for rank in failed} == {-signal.SIGTERM}:
        raise Stopped(f"{label}: stopped before it began; run the same command again to go on")
    rank = next((rank for rank in failed if (codes[rank] or 0) < 0), None)
    if rank is None:  # no signal killed one, so the first left word before the others lost their connection to it
        rank, error = _first_word(folder, failed[0])
        if error is not None:
            raise error
    file = log_file(folder, rank)
    last = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST_LINES:]
    shown = "\n".join(f"    {line}" for line in last) or "    (nothing)"
    raise ProcessLost(
        f"{label}: process {rank} of {len(codes)} ended with code {codes[rank]}; its log {file} ends with\n{shown}\n"
        "  The last checkpoint is kept; run the same command again to go on"
    )


def _first_word(folder: Path, otherwise: int) -> tuple[int, PipelineError | None]:
    """The process that failed first and its error, if it is one of those that carry their whole message."""
    words = sorted(folder.glob(f"{_FOLDER}/failure-*.json"), key=lambda file: file.stat().st_mtime_ns)
    if not words:
        return otherwise, None
    word = json.loads(words[0].read_text(encoding="utf-8"))
    rank, kind = int(word["rank"]), str(word["kind"])
    known = Stopped if kind == Stopped.__name__ else getattr(errors, kind, None)
    return rank, None if known is None else known(word["message"])


class _Relay:
    """Logs the lines that a growing file gets."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def lines(self) -> None:
        """Log the new whole lines."""
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            log.info("%s", line)
