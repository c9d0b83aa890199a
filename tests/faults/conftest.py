"""The undisturbed run that everything is compared with, and the table at the end.

DISTILLLENS_FAULTS=all (`make faults`) tries every fault as often as the table says; otherwise a few of each kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faults_run
import pytest
from faults_results import results
from faults_setup import ALL, PROPERTY, Tally, Undisturbed

TABLE = "faults.json"


def pytest_configure(config: pytest.Config) -> None:
    faults_run.serve()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    folder.chmod(0o755)
    ended = faults_run.run(folder / "experiment", folder / "runs", folder / "scratch")
    assert ended.code == 0, ended.log
    plan = faults_run.planned(folder / "experiment", folder / "runs")
    return Undisturbed(folder / "experiment", folder / "runs", plan, ended.work, ended.events, results(folder / "runs"))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return Tally(request.node.user_properties)


_found: dict[str, list[int]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call":
        return
    rows = [value for name, value in report.user_properties if name == PROPERTY]
    if report.failed and all(tried == survived for _, tried, survived in rows):
        rows.append([f"{report.nodeid.rpartition('::')[2]} (ended early)", 1, 0])
    for fault, tried, survived in rows:
        row = _found.setdefault(fault, [0, 0])
        row[0], row[1] = row[0] + tried, row[1] + survived


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _found or hasattr(config, "workerinput"):
        return
    rows = [{"fault": name, "tried": t, "survived": s, "lost": t - s} for name, (t, s) in sorted(_found.items())]
    width = max(len(name) for name in _found)
    terminalreporter.write_line(f"{'fault':{width}} {'tried':>6} {'survived':>9} {'lost':>5}")
    for row in rows:
        terminalreporter.write_line(f"{row['fault']:{width}} {row['tried']:6} {row['survived']:9} {row['lost']:5}")
    if ALL:
        (Path(config.rootpath) / TABLE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
