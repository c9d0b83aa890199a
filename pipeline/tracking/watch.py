"""How busy the machine is while a run goes on: MLflow's own counters, sampled into a file like that of a training's metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from pipeline.remote import reason
from pipeline.tracking.spool import Spool

log = logging.getLogger(__name__)
FILE = "machine.jsonl"
_INTERVAL_SECONDS = 10.0


class MachineWatch(threading.Thread):
    """Samples processor, memory, disk, network and accelerator; ends with `stop`.

    MLflow's own monitor opens a store, and asks it at every sample whether the run still goes on: it waits for a server,
    and ends with the first question that is not answered. Only its counters are used here.
    """

    def __init__(self, spool: Spool, counters: Sequence[Any]) -> None:
        super().__init__(name="machine-watch", daemon=True)
        self._spool, self._counters = spool, counters
        self._stopped = threading.Event()

    def run(self) -> None:
        """Add a record for every so many samples."""
        node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID")
        prefix = f"system/{node}/" if node else "system/"
        interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _INTERVAL_SECONDS)
        samples = int(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING") or 1)
        step = _last_step(self._spool) + 1
        try:
            while True:
                for _ in range(samples):
                    for each in self._counters:
                        each.collect_metrics()
                    if self._stopped.wait(interval):
                        return
                metrics: dict[str, float] = {}
                for each in self._counters:
                    metrics |= {f"{prefix}{name}": float(value) for name, value in each.aggregate_metrics().items()}
                    each.clear_metrics()
                self._spool.append({"step": step, "time": time.time(), "metrics": metrics}, FILE)
                step += 1
        except Exception as error:  # counters that a container does not have fail in many ways; training needs none of them
            log.warning("no more system metrics of this run: %s", reason(error))

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()
        self.join(timeout=5)


def watch_machine(spool: Spool) -> MachineWatch | None:
    """Begin to sample; None where that is switched off or does not work."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("true", "1"):
        return None
    try:
        watch = MachineWatch(spool, _counters())
    except Exception as error:  # as above
        log.warning("no system metrics of this run: %s", reason(error))
        return None
    watch.start()
    return watch


def _counters() -> list[Any]:
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor, rocm_monitor

    accelerators = []
    for kind in (gpu_monitor.GPUMonitor, rocm_monitor.ROCMMonitor):
        with contextlib.suppress(Exception):  # whatever a library that is not installed, or a driver that is not there, raises
            accelerators.append(kind())
    always = (cpu_monitor.CPUMonitor, disk_monitor.DiskMonitor, network_monitor.NetworkMonitor)
    return [*(kind() for kind in always), *accelerators[:1]]


def _last_step(spool: Spool) -> int:
    try:
        lines = (spool.folder / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return -1
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # torn when its process was killed
    return -1
