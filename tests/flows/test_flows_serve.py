"""Deployments on the test server: schedules, forms, lateness, runs that dead processes left behind, pausing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import experiment
import pytest
import yaml

from pipeline.config.serve import Parameters, Serve, load_serve
from pipeline.errors import ConfigError


@pytest.fixture(autouse=True)
def _server(prefect_server: None) -> None:
    """Every test here needs it."""


@pytest.fixture
def client() -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as found:
        yield found


def serve_file(folder: Path, **deployments: dict[str, Any]) -> Serve:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"deployments": deployments}), encoding="utf-8")
    return load_serve(path, folder / "runs")


def registered(settings: Serve, pool: str | None = None) -> dict[str, Any]:
    """Name → the deployment as the server has it."""
    from prefect.client.orchestration import get_client

    from flows.serve import deployments_of

    made = {each.name: each.apply() for each in deployments_of(settings, pool)}
    with get_client(sync_client=True) as client:
        return {name: client.read_deployment(found) for name, found in made.items()}


def deployment(folder: Path, name: str, **changes: Any) -> Any:
    return registered(serve_file(folder, **{name: {"flow": "sweep", "config": "sweep.yaml", **changes}}))[name]


def dead_process() -> str:
    """A process of this machine that has ended, as `this_process` would have named it."""
    code = "from pipeline.locks import this_process; print(this_process())"
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout.strip()


def started(client: Any, deployment_id: UUID, state: Any, process: str | None = None) -> UUID:
    """A run of a deployment in some state, which `process` works on."""
    run = client.create_flow_run_from_deployment(deployment_id)
    client.set_flow_run_state(run.id, state, force=True)
    if process is not None:
        client.update_flow_run_labels(run.id, {"process": process})
    return run.id


def test_a_schedule_keeps_its_time_zone(tmp_path: Path) -> None:
    found = deployment(tmp_path, "cron", schedule={"cron": "0 2 * * *", "timezone": "Europe/Berlin"})
    (schedule,) = found.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone, schedule.active) == ("0 2 * * *", "Europe/Berlin", True)
    assert "distilllens" in found.tags


def test_an_interval_counts_from_its_anchor_on_the_zones_clock(tmp_path: Path) -> None:
    from zoneinfo import ZoneInfo

    given = {"interval_minutes": 90, "timezone": "Asia/Tokyo", "anchor": "2026-01-05T04:00:00"}
    (schedule,) = deployment(tmp_path, "interval", schedule=given).schedules
    assert (schedule.schedule.interval, schedule.schedule.timezone) == (timedelta(minutes=90), "Asia/Tokyo")
    assert schedule.schedule.anchor_date == datetime(2026, 1, 5, 4, tzinfo=ZoneInfo("Asia/Tokyo"))
    del given["anchor"]
    again = [deployment(tmp_path, "interval", schedule=given).schedules[0].schedule.anchor_date for _ in range(2)]
    assert again[0] == again[1] == datetime(2024, 1, 1, tzinfo=ZoneInfo("Asia/Tokyo"))


def test_a_schedule_that_is_taken_out_of_the_file_is_gone(tmp_path: Path) -> None:
    assert deployment(tmp_path, "gone", schedule={"cron": "0 2 * * *", "timezone": "UTC"}).schedules
    assert not deployment(tmp_path, "gone").schedules


def test_one_run_at_a_time_and_no_queue(tmp_path: Path, client: Any) -> None:
    from prefect.client.schemas.objects import StateType
    from prefect.states import Pending

    found = deployment(tmp_path, "single")
    assert found.global_concurrency_limit.limit == 1
    assert found.concurrency_options.collision_strategy == "CANCEL_NEW"
    states = []
    for _ in range(2):
        run = client.create_flow_run_from_deployment(found.id)
        client.set_flow_run_state(run.id, Pending())
        states.append(client.read_flow_run(run.id).state)
    assert states[0].is_pending()
    assert states[1].type == StateType.CANCELLED and "concurrency limit" in states[1].message


def test_the_form_comes_from_the_config_model(tmp_path: Path) -> None:
    found = deployment(tmp_path, "form", overrides=["train.max_steps=3"], max_lateness_minutes=5)
    assert found.enforce_parameter_schema
    schema = found.parameter_openapi_schema
    fields = schema["definitions"]["Parameters"]["properties"]
    assert set(fields) == set(Parameters.model_fields)
    assert schema["definitions"]["Parameters"]["additionalProperties"] is False
    assert "dotted.path=value" in fields["overrides"]["description"]
    assert fields["max_lateness_minutes"]["exclusiveMinimum"] == 0
    assert found.parameters == {
        "settings": {
            "config": str(tmp_path / "sweep.yaml"), "overrides": ["train.max_steps=3"], "run_dir": str(tmp_path / "runs"),
            "max_lateness_minutes": 5.0,
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_lateness_minutes": -1}, "-1 is less than or equal to the minimum of 0"),
        ({"overrides": ["train.max_steps"]}, "'train.max_steps' does not match"),
        ({"config": 3}, "3 is not of type 'string'"),
        ({"overides": []}, "'overides' was unexpected"),
    ],
)
def test_a_wrong_value_is_refused_before_a_run_starts(tmp_path: Path, client: Any, wrong: Any, message: str) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    found = deployment(tmp_path, "refuses")
    before = runs_of(client, found.id)
    with pytest.raises(PrefectHTTPStatusError) as caught:
        client.create_flow_run_from_deployment(found.id, parameters={"settings": {**found.parameters["settings"], **wrong}})
    assert caught.value.response.status_code == 409
    assert message in caught.value.response.json()["detail"]
    assert runs_of(client, found.id) == before


def runs_of(client: Any, deployment_id: UUID) -> list[UUID]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
    return sorted(run.id for run in client.read_flow_runs(flow_run_filter=wanted))


def test_what_the_form_cannot_refuse_fails_with_the_same_message(tmp_path: Path, run_dir: Path) -> None:
    from flows.serve import scheduled_reproduce
    from pipeline.config import load_experiment

    config, wrong = experiment.write(tmp_path), ["train.max_step=3"]
    with pytest.raises(ConfigError) as caught:
        load_experiment(config, wrong)
    state = scheduled_reproduce(Parameters(config=str(config), overrides=wrong, run_dir=str(run_dir)), return_state=True)
    assert state.is_failed() and state.message == str(caught.value) and "did you mean max_steps?" in state.message


def test_a_late_run_does_nothing(tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.states import Scheduled

    from flows import serve

    monkeypatch.setattr(serve, "_sweep", lambda settings: "did the work")
    found = deployment(tmp_path, "late", max_lateness_minutes=30)
    settings = Parameters.model_validate(found.parameters["settings"])

    def outcome(minutes: float) -> Any:
        expected = datetime.now(UTC) - timedelta(minutes=minutes)
        run = client.create_flow_run_from_deployment(found.id, state=Scheduled(scheduled_time=expected))
        return run_it(client, run.id, settings)

    state = outcome(31)
    assert (state.type.value, state.name) == ("CANCELLED", "Skipped")
    assert "31 minutes after its scheduled time" in state.message and "allowed are 30" in state.message
    state = outcome(29)
    assert state.is_completed() and state.message == "did the work"


def run_it(client: Any, run_id: UUID, settings: Parameters) -> Any:
    """Carry out a run of the server in this process, as the process that `serve` starts for it does."""
    from prefect.flow_engine import run_flow

    from flows.serve import scheduled_sweep

    run_flow(scheduled_sweep, flow_run=client.read_flow_run(run_id), parameters={"settings": settings}, return_type="state")
    return client.read_flow_run(run_id).state


def test_runs_that_waited_too_long_are_skipped_without_a_process(tmp_path: Path, client: Any) -> None:
    from prefect.states import Scheduled

    from flows.reconcile import skip_late

    found = deployment(tmp_path, "stale", max_lateness_minutes=30)
    now = datetime.now(UTC)
    old, recent, coming = (
        client.create_flow_run_from_deployment(found.id, state=Scheduled(scheduled_time=now + timedelta(minutes=minutes)))
        for minutes in (-31, -29, 60)
    )
    assert skip_late([found.id], now) == [old.name]
    assert client.read_flow_run(old.id).state.name == "Skipped"
    for run in (recent, coming):
        assert client.read_flow_run(run.id).state.is_scheduled()


def test_only_runs_of_dead_processes_are_crashed(tmp_path: Path, client: Any) -> None:
    from prefect.states import Cancelling, Completed, Running

    from flows.reconcile import crash_orphans
    from pipeline.locks import this_process

    found, other = deployment(tmp_path, "orphans"), deployment(tmp_path, "elsewhere")
    gone = dead_process()
    orphan = started(client, found.id, Running(), gone)
    cancelling = started(client, found.id, Running(), gone)
    client.set_flow_run_state(cancelling, Cancelling())
    assert client.read_flow_run(cancelling).state.is_cancelling()
    kept = {
        started(client, found.id, Running(), this_process()): "Running",
        started(client, found.id, Running(), f"another-host {gone.split(' ', 1)[1]}"): "Running",
        started(client, found.id, Running()): "Running",
        started(client, found.id, Completed(), gone): "Completed",
        started(client, other.id, Running(), gone): "Running",
    }
    names = {client.read_flow_run(each).name for each in (orphan, cancelling)}
    assert set(crash_orphans([found.id], alone=False)) == names
    state = client.read_flow_run(orphan).state
    assert state.is_crashed() and gone in state.message
    assert client.read_flow_run(cancelling).state.is_cancelled()
    assert {each: client.read_flow_run(each).state.name for each in kept} == kept


def test_a_run_that_never_got_a_process_is_an_orphan_where_nothing_else_starts_them(tmp_path: Path, client: Any) -> None:
    from prefect.states import Pending

    from flows.reconcile import crash_orphans

    found = deployment(tmp_path, "pending")
    run = started(client, found.id, Pending())
    assert crash_orphans([found.id], alone=False) == []
    assert crash_orphans([found.id], alone=True) == [client.read_flow_run(run).name]


def test_a_crashed_orphan_gives_its_place_to_the_next_run(tmp_path: Path, client: Any) -> None:
    from prefect.states import Pending, Running

    from flows.reconcile import crash_orphans

    found = deployment(tmp_path, "place")

    def begun() -> Any:
        run = client.create_flow_run_from_deployment(found.id)
        client.set_flow_run_state(run.id, Pending())
        return client.read_flow_run(run.id)

    first = begun()
    client.set_flow_run_state(first.id, Running())
    client.update_flow_run_labels(first.id, {"process": dead_process()})
    assert begun().state.is_cancelled()
    assert crash_orphans([found.id], alone=False) == [first.name]
    assert begun().state.is_pending()


def test_a_run_says_which_process_works_on_it(tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import serve
    from pipeline.locks import is_gone, this_process

    monkeypatch.setattr(serve, "_sweep", lambda settings: "done")
    found = deployment(tmp_path, "owned")
    run = client.create_flow_run_from_deployment(found.id)
    run_it(client, run.id, Parameters.model_validate(found.parameters["settings"]))
    process = client.read_flow_run(run.id).labels["process"]
    assert process == this_process() and not is_gone(process) and is_gone(dead_process())


def test_only_mlflow_runs_of_dead_processes_are_killed(run_dir: Path) -> None:
    from mlflow import MlflowClient

    from flows.reconcile import kill_orphans
    from pipeline.locks import this_process

    store = MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    ids = {name: store.create_experiment(name) for name in ("mine", "mine · stages", "other")}
    gone = dead_process()

    def run(experiment_name: str, **tags: str) -> str:
        return str(store.create_run(ids[experiment_name], tags=tags).info.run_id)

    orphans = {run("mine", process=gone), run("mine · stages", process=gone)}
    kept = {run("mine", process=this_process()), run("mine"), run("other", process=gone)}
    assert len(kill_orphans(run_dir, ["mine", "not made yet"])) == 2
    assert {store.get_run(each).info.status for each in orphans} == {"KILLED"}
    assert {store.get_run(each).info.status for each in kept} == {"RUNNING"}
    assert "MLFLOW_TRACKING_URI" not in os.environ  # deployments have run directories of their own
    assert kill_orphans(run_dir / "nothing there", ["mine"]) == [] and not (run_dir / "nothing there").exists()


def test_serving_does_not_depend_on_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from flows.reconcile import kill_orphans

    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    assert kill_orphans(tmp_path, ["mine"]) == []
    assert "MLflow: cannot look for runs of processes that are gone: " in caplog.text


def test_the_zombie_automation_is_made_once(client: Any) -> None:
    from flows.automations import SILENCE_SECONDS, ZOMBIES, ensure_zombie_automation

    for automation in client.read_automations_by_name(ZOMBIES):
        client.delete_automation(automation.id)
    assert ensure_zombie_automation("distilllens") is True
    assert ensure_zombie_automation("distilllens") is False
    (found,) = client.read_automations_by_name(ZOMBIES)
    trigger = found.trigger
    assert found.enabled and trigger.posture.value == "Proactive" and trigger.within == timedelta(seconds=SILENCE_SECONDS)
    assert trigger.after == {"prefect.flow-run.heartbeat"} and trigger.for_each == {"prefect.resource.id"}
    assert {"prefect.flow-run.heartbeat", "prefect.flow-run.Completed", "prefect.flow-run.Skipped"} <= trigger.expect
    related = trigger.match_related
    assert "prefect.tag.distilllens" in str(related)
    (action,) = found.actions
    assert (action.type, action.state.value) == ("change-flow-run-state", "CRASHED")


def test_pause_and_resume(tmp_path: Path, client: Any) -> None:
    from flows.serve import set_paused

    schedule = {"cron": "0 2 * * *", "timezone": "UTC"}
    found = deployment(tmp_path, "rests", schedule=schedule)
    assert set_paused("rests", True, tmp_path) == "scheduled-sweep/rests"
    assert client.read_deployment(found.id).paused
    assert deployment(tmp_path, "rests", schedule=schedule).paused  # another start of the service leaves it so
    assert not deployment(tmp_path, "rests", schedule=schedule, paused=False).paused
    assert deployment(tmp_path, "rests", schedule=schedule, paused=True).paused
    set_paused("scheduled-sweep/rests", False, tmp_path)
    assert not client.read_deployment(found.id).paused
    with pytest.raises(ConfigError, match=r"'rest' is no deployment \(there are: .*scheduled-sweep/rests"):
        set_paused("rest", True, tmp_path)


def test_a_work_pool_is_made_and_left_again(tmp_path: Path, client: Any) -> None:
    from flows.serve import _ensure_pool

    _ensure_pool("machines")
    _ensure_pool("machines")
    assert client.read_work_pool("machines").type == "process"
    settings = serve_file(tmp_path, pooled={"flow": "reproduce", "config": "experiment.yaml"})
    found = registered(settings, "machines")["pooled"]
    assert found.work_pool_name == "machines" and found.entrypoint == "flows.serve.scheduled_reproduce"
    assert found.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert registered(settings)["pooled"].work_pool_name is None


def test_trials_of_a_sweep_have_a_deployment_of_their_own(tmp_path: Path) -> None:
    settings = serve_file(tmp_path, nightly={"flow": "sweep", "config": "sweep.yaml"})
    assert set(registered(settings)) == {"nightly"}
    with_trial = settings.model_copy(update={"trial": settings.trial.model_copy(update={"enabled": True})})
    found = registered(with_trial)["trial"]
    assert found.entrypoint == "flows.trial.trial" and found.global_concurrency_limit is None


def test_a_file_that_is_wrong_stops_the_service_before_anything_starts(tmp_path: Path) -> None:
    from flows.serve import main

    serve_file(tmp_path, nightly={"flow": "sweep", "config": "missing.yaml"})
    with pytest.raises(ConfigError, match=r"missing\.yaml: 1 problem[^.]*cannot be read"):
        main(tmp_path / "serve.yaml", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    from flows.serve import own_server

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: {port} is taken"), own_server(tmp_path, port):
            pass
    assert not list(tmp_path.iterdir())


def test_only_repeated_messages_are_kept_out_of_the_log() -> None:
    import logging

    from prefect.exceptions import FailedRun

    from flows.serve import _says_something_new

    def record(error: Exception | None) -> logging.LogRecord:
        return logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 1, "", (), error and (type(error), error, None))

    assert not _says_something_new(record(FailedRun("the state's message")))
    assert _says_something_new(record(ValueError("a bug"))) and _says_something_new(record(None))


def test_a_run_says_what_it_came_to(tmp_path: Path, run_dir: Path) -> None:
    from flows.serve import scheduled_evaluate, scheduled_reproduce, scheduled_sweep

    train = {"max_steps": 2, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2, "seeds": [10]}
    config = experiment.write(tmp_path, methods={"sft": None}, train=train)
    settings = Parameters(config=str(config), run_dir=str(run_dir))

    def said(flow: Any, given: Parameters) -> str:
        state = flow(given, return_state=True)
        assert state.is_completed(), state.message
        return str(state.message)

    assert said(scheduled_evaluate, settings) == "3 trials finished (3 of them now)"
    assert said(scheduled_reproduce, settings) == "nothing new: 3 trials finished"
    assert said(scheduled_reproduce, settings) == "nothing new: 3 trials finished"
    # Under the experiment's own name, the sweep has the same trials.
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"name": "tiny", "experiment": str(config)}))
    nightly = settings.model_copy(update={"config": str(sweep)})
    assert said(scheduled_sweep, nightly) == "nothing new: 3 trials finished"
    (run_dir / "tiny" / "tracked.json").unlink()
    assert said(scheduled_sweep, nightly) == "nothing new: 3 trials finished"
    sweep.write_text(yaml.safe_dump({"name": "tiny", "experiment": str(config), "axes": {"train_seed": [10, 20]}}))
    assert said(scheduled_sweep, nightly) == "4 trials finished (1 of them now)"
