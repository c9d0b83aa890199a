"""The engines that carry out a sweep's trials: Prefect's own threads, Dask or Ray."""

from __future__ import annotations

from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipeline.config.sweep import DaskEngine, RayEngine, Sweep
from pipeline.errors import ConfigError


def task_runner(settings: Sweep) -> TaskRunner[Any]:
    """The engine of a sweep; a cluster without an address is started here and ends with the sweep.

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        if isinstance(settings.engine, DaskEngine):
            return _dask(settings.engine, settings.concurrency)
        if isinstance(settings.engine, RayEngine):
            return _ray(settings.engine, settings.concurrency)
    except ImportError:
        kind = settings.engine.kind
        raise ConfigError(f'engine: {kind} needs prefect-{kind}, which is not installed; pip install ".[{kind}]"') from None
    return ThreadPoolTaskRunner(max_workers=settings.concurrency)


def _dask(engine: DaskEngine, count: int) -> TaskRunner[Any]:
    from prefect_dask.task_runners import DaskTaskRunner

    here = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(address=engine.address, cluster_kwargs=None if engine.address else here)


def _ray(engine: RayEngine, count: int) -> TaskRunner[Any]:
    from prefect_ray.task_runners import RayTaskRunner

    # Without an address Ray starts here, with as many CPUs as the trials ask for: their number at a time is the sweep's.
    here = {} if engine.address else {"num_cpus": max(1, round(count * engine.cpus_per_trial)), "include_dashboard": False}
    runner: TaskRunner[Any] = RayTaskRunner(address=engine.address, init_kwargs=here)
    return runner
