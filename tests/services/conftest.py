"""The services of docker/compose.yaml, started as plain processes once for all tests here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where the services are demanded (DISTILLLENS_SERVICES=required)."""
    if os.environ.get("DISTILLLENS_SERVICES") == "required":
        pytest.fail(reason)
    pytest.skip(f"{reason} (DISTILLLENS_SERVICES=required makes this a failure)")


@pytest.fixture(scope="session")
def services() -> ModuleType:
    """docker/services.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("compose_services", DOCKER / "services.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def say() -> Any:
    """Prints a line of the record that a run of these tests leaves (pytest -s)."""
    began = time.monotonic()
    print()

    def line(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {time.monotonic() - began:6.1f} s  {text}", flush=True)

    return line


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the compose file: folders for secrets and for experiments."""
    folder = tmp_path_factory.mktemp("compose")
    (folder / "configs").mkdir()
    subprocess.run([str(DOCKER / "make-secrets.sh"), str(folder / "secrets")], check=True, capture_output=True)
    return {"SECRETS": str(folder / "secrets"), "CONFIGS": str(folder / "configs")}


@pytest.fixture(scope="session")
def stack(services: ModuleType, settings: dict[str, str], say: Any) -> Iterator[Any]:
    """PostgreSQL, Prefect's and MLflow's servers, healthy; the worker is left to the tests."""
    for command in ("postgres", "initdb", "pg_isready", "psql"):
        if shutil.which(command) is None:
            unavailable(f"{command} is not installed (Debian: postgresql, with /usr/lib/postgresql/*/bin on the path)")
    for module, package in (("psycopg2", "psycopg2-binary"), ("flask_wtf", "mlflow[auth]")):
        if importlib.util.find_spec(module) is None:
            unavailable(f"{package} is not installed (the extra `services`)")
    compose = services.read_compose(DOCKER / "compose.yaml", settings)
    # Not one of pytest's folders, which PostgreSQL's user could not enter.
    with tempfile.TemporaryDirectory(prefix="distilllens-services-") as folder:
        made = services.Stack(compose, Path(folder), say)
        try:
            made.up("prefect-server", "mlflow")
            yield made
        finally:
            made.down()
            left = [pid for name in compose["services"] for pid in made.processes(name)]
            say(f"everything stopped, {len(left)} processes left")
        assert left == []
