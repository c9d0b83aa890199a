from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.loading import load_experiment, load_sweep
from pipeline.config.serve import Cron, Interval, Parameters, Serve, load_serve, parameters_of
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MINIMAL: dict[str, Any] = {"flow": "sweep", "config": "sweeps/a.yaml"}


def load(folder: Path, content: dict[str, Any], **top: Any) -> Serve:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"deployments": {"nightly": {**MINIMAL, **content}}, **top}), encoding="utf-8")
    return load_serve(path, folder / "elsewhere" / "runs")


def refused(folder: Path, content: dict[str, Any], **top: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, content, **top)
    return str(caught.value)


def test_the_shipped_file_names_files_that_load() -> None:
    settings = load_serve(CONFIGS / "serve.yaml", Path("runs"))
    flows = {deployment.flow for deployment in settings.deployments.values()}
    assert flows == {"reproduce", "sweep", "evaluate"}
    for deployment in settings.deployments.values():
        load_sweep(deployment.config) if deployment.flow == "sweep" else load_experiment(deployment.config)


def test_paths_come_back_absolute(tmp_path: Path) -> None:
    own = load(tmp_path, {"run_dir": "here"}).deployments["nightly"]
    assert (own.config, own.run_dir) == (tmp_path / "sweeps" / "a.yaml", tmp_path / "here")
    assert load(tmp_path, {}).deployments["nightly"].run_dir == tmp_path / "elsewhere" / "runs"


def test_what_a_run_is_started_with(tmp_path: Path) -> None:
    deployment = load(tmp_path, {"overrides": ["train.max_steps=3"], "max_lateness_minutes": 5}).deployments["nightly"]
    assert parameters_of(deployment) == Parameters(
        config=str(tmp_path / "sweeps" / "a.yaml"), overrides=["train.max_steps=3"],
        run_dir=str(tmp_path / "elsewhere" / "runs"), max_lateness_minutes=5,
    )  # fmt: skip


def test_a_schedule_is_told_by_its_keys(tmp_path: Path) -> None:
    cron = {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}
    assert load(tmp_path, {"schedule": cron}).deployments["nightly"].schedule == Cron(**cron)
    interval = {"interval_minutes": 90, "timezone": "UTC", "anchor": "2026-01-05T04:00:00"}
    assert load(tmp_path, {"schedule": interval}).deployments["nightly"].schedule == Interval(
        interval_minutes=90, timezone="UTC", anchor=datetime(2026, 1, 5, 4)
    )
    assert load(tmp_path, {"schedule": None}).deployments["nightly"].schedule is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schedule": {"cron": "0 2 * * *"}}, "deployments.nightly.schedule.timezone: missing"),
        (
            {"schedule": {"cron": "0 2 * * *", "timezone": "Europe/Berln"}},
            "deployments.nightly.schedule.timezone: no time zone of that name; did you mean Europe/Berlin?",
        ),
        (
            {"schedule": {"cron": "0 25 * * *", "timezone": "UTC"}},
            "deployments.nightly.schedule.cron: not a cron expression",
        ),
        ({"schedule": {"cron": "at night", "timezone": "UTC"}}, "deployments.nightly.schedule.cron: not a cron expression"),
        ({"schedule": {"interval_minutes": 0, "timezone": "UTC"}}, "deployments.nightly.schedule.interval_minutes: "),
        (
            {"schedule": {"cron": "0 2 * * *", "timezone": "UTC", "time_zone": "UTC"}},
            "deployments.nightly.schedule.time_zone: unknown key; did you mean timezone?",
        ),
        ({"flow": "train"}, "deployments.nightly.flow: Input should be 'reproduce', 'sweep' or 'evaluate'"),
        ({"overrides": ["train.max_steps"]}, "deployments.nightly.overrides.0: "),
        ({"overrides": ["train..max_steps=1"]}, "deployments.nightly.overrides.0: "),
        ({"max_lateness_minutes": 0}, "deployments.nightly.max_lateness_minutes: "),
        ({"lateness": 3}, "deployments.nightly.lateness: unknown key"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, content)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = refused(tmp_path, {"flow": "train"}, port=0, limit=0)
    assert "3 problems" in text and "port: " in text and "limit: " in text


def test_trials_need_a_place_beside_their_sweep(tmp_path: Path) -> None:
    assert "limit: 1 leaves no place for a trial" in refused(tmp_path, {}, limit=1, trial={"enabled": True})
    assert load(tmp_path, {}, limit=1).limit == 1 and load(tmp_path, {}, trial={"enabled": True}).trial.enabled


def test_a_file_without_deployments_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("deployments: {}\n")
    with pytest.raises(ConfigError, match="deployments: "):
        load_serve(path, tmp_path)
