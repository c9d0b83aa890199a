"""A tiny experiment in a process of its own, at a chosen moment of which something goes wrong.

The processes are forked from a server that has imported everything (multiprocessing's forkserver), without the flow engine
and the tracker, which start slowly and write none of the artifacts.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stages

from pipeline.errors import PipelineError
from pipeline.evaluation.generate import Decoder
from pipeline.plan import Plan
from pipeline.processes import exit_on_sigterm
from pipeline.reporting import figures, lens_figure  # noqa: F401  # with matplotlib, which a process would import otherwise
from pipeline.stages import cache, compare, finetune_teacher, prepare, seqkd, student
from pipeline.teacher.cache import writer
from pipeline.training import loop

STAGES = ("prepare", "teacher", "student", "cache", "seqkd", "train", "evaluate", "compare")
CHECKPOINT_EVERY = 2
SHARD_BYTES = 60_000
BUDGET: dict[str, Any] = {"max_steps": 6, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": CHECKPOINT_EVERY}
CHANGES: dict[str, Any] = {
    "teacher_finetune": {"train": {**BUDGET, "max_steps": 4, "seeds": [3]}, "validation": {"select": "loss"}},
    "methods": {
        "kd": None,
        "distilllens": {"lens": {"pairs": {"kind": "uniform", "count": 2}}},
        "seqkd": {"generation": {"decoding": {"max_new_tokens": 6}, "batch_size": 8}},
    },
    "train": {**BUDGET, "seeds": [10]},
    "validation": {"select": "loss", "every_steps": 3},
    "evaluation": {"decoding": {"max_new_tokens": 6}, "seeds": [1, 2], "batch_size": 4},
    "cache": {"dtype": "float32", "batch_size": 4},
}
NOBODY = 65534
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        number: signal that the process sends itself, 0 for none.
        event: before which change of the run directory (of `Trace`) it does so, -1 for none of them.
        twice: whether it sends the signal a second time at the next event.
        file_bytes: largest file that may be written, -1 for any: the kernel's answer is that of a disk with a quota.
        powerless: run as a user who may write nothing that is not writable for everybody.
    """

    number: int = 0
    event: int = -1
    twice: bool = False
    file_bytes: int = -1
    powerless: bool = False


NONE = Fault()


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal; None where it was still running when it was looked at.
        log: what it said.
        events: the changes of the run directory that it made, as far as they are counted.
        work: the pieces of work that it began, by kind.
    """

    code: int | None
    log: str
    events: list[str]
    work: dict[str, int]


def planned(folder: Path, run_dir: Path) -> Plan:
    """The experiment of all these tests."""
    return stages.planned(folder, run_dir=run_dir, **CHANGES)


def run_all(plan: Plan) -> None:
    """Every stage, each of which reuses what is there."""
    prepare.run(plan.data)
    for benchmark in plan.benchmarks:
        prepare.run_benchmark(benchmark)
    assert plan.finetune is not None and plan.cache is not None
    finetune_teacher.run(plan.finetune)
    student.run(plan.student)
    cache.run(plan.cache)
    for generation in plan.generations:
        seqkd.run(generation)
    stages.run_trials(plan)
    compare.run(plan.comparison)


class Process:
    """One process that runs the experiment."""

    def __init__(self, folder: Path, run_dir: Path, scratch: Path, fault: Fault = NONE) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        number = len(list(scratch.glob("*.log")))
        self._files = tuple(scratch / f"{number}.{kind}" for kind in ("log", "events", "work"))
        for file in self._files:
            file.touch()
            file.chmod(0o666)
        self.process = CONTEXT.Process(target=_child, args=(folder, run_dir, self._files, fault))
        self.process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def wait_until(self, seconds: float) -> bool:
        """Let it run for so long; whether it ended before."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def wait(self, seconds: float = 200) -> Ended:
        """Wait for its end; a process that does not end is killed, with code None."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        log, events, work = (file.read_text(errors="replace") for file in self._files)
        kinds = work.split()
        return Ended(code, log, events.splitlines(), {kind: kinds.count(kind) for kind in sorted(set(kinds))})


def run(folder: Path, run_dir: Path, scratch: Path, fault: Fault = NONE) -> Ended:
    """Run the experiment in a process and wait for its end."""
    return Process(folder, run_dir, scratch, fault).wait()


def _child(folder: Path, run_dir: Path, files: tuple[Path, Path, Path], fault: Fault) -> None:
    log = files[0].open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=log, force=True)
    # As the command line does it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_on_sigterm()
    _count_work(files[2])
    # Planned before anything goes wrong: it reads, and writes nothing.
    plan = planned(folder, run_dir)
    _trace(run_dir, files[1], fault)
    if fault.file_bytes >= 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, resource.RLIM_INFINITY))
    if fault.powerless and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        run_all(plan)
        code = 0
    except PipelineError as error:
        _say(log.fileno(), f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        _say(log.fileno(), f"unexpected {type(error).__name__}: {error}")
        code = 1
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def _say(descriptor: int, text: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(descriptor, f"{text}\n".encode())


def _count_work(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            os.write(descriptor, f"{kind}\n".encode())
            return function(*args, **kwargs)

        return counting

    loop.optimizer_step = counted("step", loop.optimizer_step)
    writer._states = counted("captured", writer._states)
    Decoder.decode = counted("decoded", Decoder.decode)  # type: ignore[method-assign]
    cache.capture = _in_small_shards(writer.capture)  # type: ignore[attr-defined]


def _in_small_shards(capture: Callable[..., Any]) -> Callable[..., Any]:
    """The configuration counts shards in MiB, more than all states of these models."""
    return lambda *args, **kwargs: capture(*args, **{**kwargs, "shard_bytes": SHARD_BYTES})


def _trace(run_dir: Path, file: Path, fault: Fault) -> None:
    """Write down every change of the run directory just before it is made, and send the signal when it is time."""
    descriptor, count, root = os.open(file, os.O_WRONLY | os.O_APPEND), 0, str(run_dir)

    def happens(what: str, path: str) -> None:
        nonlocal count
        if not path.startswith(root):
            return
        moment, count = count, count + 1
        if fault.file_bytes < 0:
            os.write(descriptor, f"{what} {path[len(root) :]}\n".encode())
        if fault.number and (moment == fault.event or (fault.twice and moment == fault.event + 1)):
            os.kill(os.getpid(), fault.number)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str) and writes:
                happens("write", path)
        elif event in ("os.rename", "os.link"):
            happens(event, os.fspath(args[1]) if isinstance(args[1], (str, os.PathLike)) else "")
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            path, folder = os.fspath(args[0]), args[-1]
            # shutil.rmtree removes relatively to an open folder.
            happens(event, path if os.path.isabs(path) or folder < 0 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}")
        elif event == "shutil.rmtree":
            happens(event, os.fspath(args[0]))

    real = os.fsync

    def fsync(number: int) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    sys.addaudithook(hook)
    os.fsync = fsync  # type: ignore[assignment]


def serve() -> None:
    """Start the server that processes are forked from, with everything imported."""
    here = Path(__file__).resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parents[2]), str(here.parents[1]), str(here.parent)])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CONTEXT.set_forkserver_preload(["faults_run"])
