"""A single trial as a flow: what a worker of a work pool runs for a sweep with `engine: work-pool`."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.trial import carry_out


@flow(name="trial", flow_run_name="{spec[name]}")
def trial(spec: dict[str, Any], environment: dict[str, str], time_limit: float | None = None) -> float:
    """Carry out a trial in a process of its own; returns its wall time in seconds.

    Args:
        spec: see `pipeline.worker.spec_of`.
        environment: variables for the process.
        time_limit: seconds, None for no limit.
    """
    return carry_out(spec, environment, time_limit)
