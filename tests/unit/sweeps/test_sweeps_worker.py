"""A trial's process checks that it carries out what was planned."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import stages

from pipeline import worker
from pipeline.errors import ConfigError


def spec(folder: Path, name: str) -> dict[str, Any]:
    plan = stages.planned(folder)
    trial = next(trial for trial in plan.trials if trial.name == name)
    return json.loads(json.dumps(worker.spec_of(plan, trial, {})))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(worker, "make_inputs", lambda plan: None)
    monkeypatch.setattr(worker, "MLflowTracker", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(worker, "run_trial", lambda plan, trial, *given: names.append(trial.name))
    return names


@pytest.mark.parametrize("name", ["untrained", "kd s20"])
def test_the_order_of_benchmarks_may_change_on_the_way(name: str, ran: list[str], tmp_path: Path) -> None:
    given = spec(tmp_path, name)
    given["experiment"]["benchmarks"] = dict(reversed(given["experiment"]["benchmarks"].items()))
    worker._run(given, tmp_path)
    assert ran == [name]


def test_other_inputs_than_those_of_the_plan_are_refused(ran: list[str], tmp_path: Path) -> None:
    given = spec(tmp_path, "kd s10")
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0].replace("instruction", "instruction", 1) + "\n")
    with pytest.raises(ConfigError, match="its inputs or the code are not those that it was planned with"):
        worker._run(given, tmp_path)
    assert not ran
