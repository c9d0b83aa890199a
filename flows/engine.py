"""The Prefect engine: its settings, which must be applied before prefect is imported, and its server where there is none."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import socket
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.locks import exclusive
from pipeline.processes import Outcome, run_process

log = logging.getLogger(__name__)
_START_SECONDS = 120.0
_RESTARTS = 3
_UNTIL_PARENT_DIES = (
    "from pipeline.processes import die_with_parent as d; d(); import os, sys; os.execv(sys.executable, sys.argv[1:])"
)


class ServerFailed(PipelineError):
    """The Prefect server did not start."""

    exit_code = 1


@contextlib.contextmanager
def engine(run_dir: Path) -> Iterator[None]:
    """Prefect for the flows of this process: the user's server, or one of our own for as long as this lasts.

    Prefect would start one too, but that outlives a process that is killed. If ours does not start, its address stands all
    the same, and the flows find out that nobody answers there (`flows.outage`).
    """
    configure_prefect(run_dir)
    if users_server() is not None:
        yield
        return
    package = importlib.util.find_spec("prefect")  # located, not imported: it reads its settings then
    assert package is not None and package.submodule_search_locations
    port = _free_port()
    command = [
        sys.executable, "-m", "uvicorn", "--app-dir", str(package.submodule_search_locations[0]), "--factory",
        "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error",
    ]  # fmt: skip
    output = run_dir.resolve() / ".prefect" / "server.log"
    environment = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    address = f"http://127.0.0.1:{port}/api"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(server_process(command, environment, address, output))
        except ServerFailed as error:
            log.info("%s", error)
        os.environ["PREFECT_API_URL"] = address
        try:
            yield
        finally:
            del os.environ["PREFECT_API_URL"]


@contextlib.contextmanager
def server_process(command: Sequence[str], environment: dict[str, str], address: str, output: Path) -> Iterator[None]:
    """A Prefect server that ends with this process, however that ends; if it dies before, it is started again a few times.

    Args:
        command: what starts it.
        environment: variables for it.
        address: of its API.
        output: its log.

    Raises:
        ServerFailed: it does not answer in time.
    """
    stop, healthy = threading.Event(), threading.Event()
    start = functools.partial(
        run_process, [sys.executable, "-c", _UNTIL_PARENT_DIES, *command], output, environment, None, stop
    )
    thread = threading.Thread(target=_keep_running, args=(start, healthy, stop), name="prefect-server")
    try:
        # Servers of one run directory share a database, which two at once would both migrate.
        with exclusive(output.with_name("server-start")):
            thread.start()
            _wait_until_healthy(address, thread, output)
        healthy.set()
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _keep_running(start: Callable[[], Outcome], healthy: threading.Event, stop: threading.Event) -> None:
    for _ in range(_RESTARTS + 1):
        outcome = start()
        if stop.is_set() or not healthy.is_set():
            return
        log.info("the Prefect server ended with code %d", outcome.code)


def _wait_until_healthy(address: str, thread: threading.Thread, output: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            if direct.open(f"{address}/health", timeout=10.0).status == 200:
                return
        time.sleep(0.2)
    raise ServerFailed(f"the Prefect server did not start; it says why in {output}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
