"""What the browser tests have in common."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

METHODS = ("sft", "kd", "mse", "distilllens")
SEEDS = (10, 20)
BENCHMARKS = ("general", "tasks")


def errors(browser: Any) -> list[str]:
    """What the page logged as an error since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def hosts(browser: Any) -> set[str]:
    """Every host that was asked for something since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {host for url in asked if (host := urlsplit(url).hostname)}


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait for a condition; returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not seen: {what}"
        time.sleep(0.2)
    return found
