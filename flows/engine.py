"""Settings of the embedded Prefect engine; must be applied before prefect is imported."""

from __future__ import annotations

import logging
import os
import time
import tomllib
from pathlib import Path
from uuid import UUID

log = logging.getLogger(__name__)
_RECORDING_SECONDS = 15.0


def configure_prefect(run_dir: Path) -> None:
    """Keep Prefect's state in the run directory and its telemetry off, unless the user has a server of their own."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if users_server() is not None:
        return
    home = run_dir.resolve() / ".prefect"
    home.mkdir(parents=True, exist_ok=True)
    defaults = {
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
        # Without batching the ephemeral server records task runs so late that most are lost at exit. A short flush interval
        # would help too, but 0.2 s turns its recorder into a busy loop that takes a whole core.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        # The stages log for themselves, and the command line prints one message for an expected failure.
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def users_server() -> str | None:
    """The API that the user's environment or active Prefect profile names, None if the engine is ours."""
    url = os.environ.get("PREFECT_API_URL")
    if url:
        return url
    profiles = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")) / "profiles.toml"
    try:
        content = tomllib.loads(profiles.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = content.get("profiles", {}).get(content.get("active", ""), {})
    url = active.get("PREFECT_API_URL")
    return str(url) if url else None


def wait_for_recording(flow_run_id: UUID, tasks: int) -> None:
    """Wait until the server has all `tasks` task runs of a flow run in their final state; it records them with a delay."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    deadline = time.monotonic() + _RECORDING_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])), limit=200)
            if len(runs) >= tasks and all(run.state is not None and run.state.is_final() for run in runs):
                return
            time.sleep(0.3)
    log.warning("Prefect had not recorded every task run after %.0f s", _RECORDING_SECONDS)
