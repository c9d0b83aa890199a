"""A hub that fails at any of its requests: prepared rows are those of one that never fails, or there is one message."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import experiment
import hub_server
import pytest
from faults_results import differences, results
from faults_setup import ALL, Tally
from hub_server import REPO, Hub

from pipeline.config import load_experiment
from pipeline.errors import PipelineError
from pipeline.hub import HubUnavailable
from pipeline.plan import plan_experiment
from pipeline.stages import import_model, prepare

SETTINGS = {
    "teacher": {"kind": "hub", "repo": REPO, "revision": "main"},
    "data.train": {"kind": "hub", "repo": REPO, "file": "train.jsonl", "revision": "main"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiment.write(tmp_path_factory.mktemp("experiment"))


@pytest.fixture
def hub(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The experiment's teacher and rows on a hub, which nothing waits for."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with hub_server.running() as served:
        served.model = {file.name: file.read_bytes() for file in (config.parent / "teacher").iterdir()}
        served.data = {"train.jsonl": (config.parent / "train.jsonl").read_bytes()}
        hub_server.use(monkeypatch, served.port, str(tmp_path / "cache"))
        yield served


def prepared(config: Path, run_dir: Path) -> dict[str, object]:
    """The files of the prepared rows, read from the hub with the teacher's tokenizer."""
    changes = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    plan = plan_experiment(load_experiment(config, changes), run_dir)
    for model in plan.models:
        import_model.run(model)
    prepare.run(plan.data)
    return results(run_dir)


@pytest.fixture
def expected(hub: Hub, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The files without a fault; the hub counts from zero afterwards, and the cache is empty."""
    found = prepared(config, tmp_path / "expected")
    hub_server.use(monkeypatch, hub.port, str(tmp_path / "other"))
    return found


def fresh_cache(hub: Hub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    hub_server.use(patch, hub.port, str(folder / "cache"))


@pytest.mark.parametrize("status", [429, 500, 503] if ALL else [503])
def test_any_request_may_fail_for_a_while(
    status: int, hub: Hub, expected: dict[str, object], config: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, tally: Tally,
) -> None:  # fmt: skip
    count = len(hub.requests)
    for number in range(0, count, 1 if ALL else 3):
        fresh_cache(hub, monkeypatch, tmp_path / str(number))
        hub.statuses = [*[200] * number, status, status]
        found = prepared(config, tmp_path / str(number) / "runs")
        tally("hub fails twice", not (lost := differences(expected, found)), f"request {number}: {lost}")


@pytest.mark.parametrize("fault", ["cut", "corrupt"])
def test_any_body_may_be_damaged(
    fault: str, hub: Hub, expected: dict[str, object], config: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, tally: Tally,
) -> None:  # fmt: skip
    for bodies in range(1, len(hub.model) + 1) if ALL else (1, len(hub.model)):
        fresh_cache(hub, monkeypatch, tmp_path / str(bodies))
        setattr(hub, fault, bodies)
        found = prepared(config, tmp_path / str(bodies) / "runs")
        tally(f"hub body {fault}", not (lost := differences(expected, found)), f"{bodies} bodies: {lost}")
        setattr(hub, fault, 0)


def test_a_hub_that_stays_away_leaves_nothing_behind_but_a_message(
    hub: Hub, expected: dict[str, object], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    count = len(hub.requests)
    for number in range(0, count, 1 if ALL else 4):
        room = tmp_path / str(number)
        fresh_cache(hub, monkeypatch, room)
        hub.statuses = [*[200] * number, *[503] * 1000]
        with pytest.raises(PipelineError) as raised:
            prepared(config, room / "runs")
        said = isinstance(raised.value, HubUnavailable) and "HTTP status 503" in str(raised.value)
        hub.statuses = []
        lost = differences(expected, prepared(config, room / "runs"))
        tally("hub stays away", said and not lost, f"request {number}: {raised.value}; then {lost}")
