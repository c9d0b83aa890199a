"""One of several processes that train together: `python -m pipeline.training.worker JOB.json RANK`, see `launch`."""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.training.launch import Job, failure_file
from pipeline.training.stopping import note_every_sigterm

_PR_SET_PDEATHSIG = 1


def main(job_file: str, rank: int) -> None:
    """Join the others, run the job's entry, and leave word of what went wrong."""
    stop = note_every_sigterm()
    job = Job.read(Path(job_file))
    die_with(job.parent)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    from pipeline.training.device import flush_denormals
    from pipeline.training.replicas import join, leave

    flush_denormals()
    group = join(rank, job.processes, job.rendezvous, job.division)
    try:
        importlib.import_module(job.entry).run_rank(job.task, job.folder, group, stop)
    except BaseException as error:
        known = isinstance(error, PipelineError)
        if not known:
            traceback.print_exc()
        word = {"kind": type(error).__name__ if known else "", "message": str(error), "rank": rank}
        failure_file(job.folder, rank).write_text(json.dumps(word), encoding="utf-8")
        sys.stderr.flush()
        # Only now, with its word on disk, may the others lose their connection to this one.
        os._exit(error.exit_code if isinstance(error, PipelineError) else 1)
    leave()


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends (Linux); at once if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
