"""What each of the trials that run at a time may use of one machine: its devices, or its share of the cores."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.config.sweep import DaskEngine, LocalEngine, RayEngine, Sweep, TrialLimits
from pipeline.errors import ConfigError

Slot = dict[str, str]
"""Environment variables of a trial's process."""


def sweep_slots(sweep: Sweep) -> list[Slot]:
    """One slot for each trial at a time; on an engine with machines of its own, those say what a trial gets."""
    here = isinstance(sweep.engine, LocalEngine) or (
        isinstance(sweep.engine, DaskEngine | RayEngine) and sweep.engine.address is None
    )
    if not here:
        threads = sweep.trial.threads
        return [{} if threads is None else {"OMP_NUM_THREADS": str(threads)} for _ in range(sweep.concurrency)]
    # Ray hands out the devices of its workers itself.
    devices = [] if isinstance(sweep.engine, RayEngine) else visible_devices()
    return trial_slots(sweep.concurrency, sweep.trial, devices, len(os.sched_getaffinity(0)))


def trial_slots(concurrency: int, limits: TrialLimits, devices: Sequence[str], cores: int) -> list[Slot]:
    """Divide devices and cores among at most `concurrency` trials.

    Args:
        concurrency: trials at a time; fewer where the devices do not reach.
        limits: devices and threads of one trial.
        devices: as in CUDA_VISIBLE_DEVICES; empty for a machine without.
        cores: of this machine.

    Raises:
        ConfigError: a trial needs more devices than there are.
    """
    groups = [devices[first : first + limits.gpus] for first in range(0, len(devices), limits.gpus)]
    groups = [group for group in groups if len(group) == limits.gpus]
    if devices and not groups:
        raise ConfigError(f"trial.gpus: {limits.gpus} devices for one trial, but this machine has {len(devices)}; lower it")
    count = min(concurrency, len(groups)) if devices else concurrency
    threads = {"OMP_NUM_THREADS": str(limits.threads or max(1, cores // count))}
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": ",".join(groups[i])} if devices else {})} for i in range(count)]


def visible_devices() -> list[str]:
    """The CUDA devices of this process, by the names that CUDA_VISIBLE_DEVICES takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
