"""A finished experiment on tiny models, its MLflow UI, and a headless browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import experiment
import pytest
from browsing import SEEDS, until

ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 120
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def absent(reason: str) -> None:
    """Skip, or fail where a browser is required."""
    if os.environ.get("DISTILLLENS_BROWSER") == "required":
        pytest.fail(f"DISTILLLENS_BROWSER=required, but {reason}")
    pytest.skip(f"{reason} (DISTILLLENS_BROWSER=required makes this a failure)")


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """Paths of the browser and its driver."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        absent("no chromium with chromedriver; apt-get install chromium chromium-driver")
    try:
        import axe_core_python  # noqa: F401
        import selenium  # noqa: F401
    except ImportError as error:
        absent(f"{error.name} is not installed; pip install '.[test]'")
    return str(browser), str(driver)


@pytest.fixture
def open_page(chromium: tuple[str, str]) -> Iterator[Callable[..., Any]]:
    """Opens an address in a browser of its own: `open_page(url, width=…, height=…, dark=…)`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browsers = []

    def open_(url: str, width: int = 1600, height: int = 1000, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium[0]
        for option in (*_OPTIONS, f"--window-size={width},{height}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(chromium[1]))
        browsers.append(browser)
        browser.set_script_timeout(60)
        # A window cannot be as narrow as a phone.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(url)
        return browser

    yield open_
    for browser in browsers:
        browser.quit()


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run_dir(chromium: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a finished experiment: four methods, two training seeds, two benchmarks."""
    folder = tmp_path_factory.mktemp("ui")
    config = experiment.write(
        folder,
        description="Tiny random models: four methods, two training seeds.",
        train={"max_steps": 6, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2, "seeds": list(SEEDS)},
        validation={"decoding": {"max_new_tokens": 8}, "every_steps": 2},
        evaluation={"decoding": {"max_new_tokens": 8}, "seeds": [1, 2], "lens_profile": True},
    )
    command = [sys.executable, "-m", "pipeline.cli", "reproduce", str(config), "--run-dir", str(folder / "runs")]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs"


@pytest.fixture(scope="session")
def leaderboard(run_dir: Path) -> Iterator[str]:
    """The address that `distilllens ui` prints, served."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.cli", "ui", "--run-dir", str(run_dir), "--port", str(port)]
    log = run_dir / "ui.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, cwd=run_dir, env=_environment(), stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        until(lambda: server.poll() is not None or _answers(port), f"the MLflow server; {log}", _START_SECONDS)
        assert server.poll() is None, log.read_text()[-3000:]
        first = log.read_text().splitlines()[0]
        yield first.partition(": ")[2].partition(" ")[0]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
