"""Deployments: which experiments and sweeps run by themselves, when, in which time zone, and what happens to late runs."""

from __future__ import annotations

import difflib
import zoneinfo
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.base import Strict
from pipeline.config.loading import read_yaml, validate

Override = Annotated[str, Field(pattern=r"^\s*[^=.\s]+(\.[^=.\s]+)*\s*=")]


class Parameters(Strict):
    """What one run does."""

    config: str = Field(min_length=1)
    """Path of the experiment or sweep file, on the machine that runs it."""
    overrides: list[Override] = []
    """Settings of the experiment (of a sweep's base experiment), each as `dotted.path=value`."""
    run_dir: str = Field(default="runs", min_length=1)
    """Where artifacts, tracking store and comparison go."""
    max_lateness_minutes: float = Field(default=60, gt=0, le=10_000_000)
    """A run that starts later than this after its scheduled time does nothing."""


def _time_zone(name: str) -> str:
    known = zoneinfo.available_timezones()
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    raise ValueError(
        f"no time zone of that name{f'; did you mean {close[0]}?' if close else ''} (for example Europe/Berlin, UTC)"
    )


def _cron(text: str) -> str:
    # The parser that will be used is Prefect's own; the core loads it only where a schedule is really read.
    from prefect.client.schemas.schedules import CronSchedule as PrefectCron
    from pydantic import ValidationError

    try:
        PrefectCron(cron=text)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ValueError(f"not a cron expression: {reason}; write minute hour day month weekday, as in 0 2 * * *") from None
    return text


TimeZone = Annotated[str, AfterValidator(_time_zone)]


class Cron(Strict):
    """At the times of a cron expression, on the clock of a time zone."""

    kind: Literal["cron"] = "cron"
    cron: Annotated[str, AfterValidator(_cron)]
    """Minute, hour, day, month and weekday."""
    timezone: TimeZone
    """Name in the IANA database. Never assumed: the machine's own zone is UTC in most containers."""


class Interval(Strict):
    """Every so many minutes."""

    kind: Literal["interval"] = "interval"
    interval_minutes: float = Field(ge=1, le=10_000_000)
    timezone: TimeZone
    """Name in the IANA database; whole days keep their hour on this zone's clock when it changes to summer time and back."""
    anchor: datetime | None = None
    """A time at which a run starts, from which the others are counted; without an offset it is on the zone's clock. null
    counts from midnight of 1 January 2024, a Monday, so that a restart moves nothing."""


def _schedule(value: Any) -> Any:
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "interval" if "interval_minutes" in value else "cron", **value}
    return value


Schedule = Annotated[Annotated[Cron | Interval, Field(discriminator="kind")], BeforeValidator(_schedule)]
Tag = Annotated[str, Field(min_length=1)]


class Deployment(Strict):
    """One experiment or sweep that is run on a schedule or from the Prefect UI."""

    flow: Literal["reproduce", "sweep", "evaluate"]
    config: Path
    """Experiment or sweep file, relative to this file."""
    overrides: list[Override] = []
    run_dir: Path | None = None
    """Where artifacts, tracking store and comparison go, relative to this file; null takes `--run-dir`."""
    schedule: Schedule | None = None
    """null: it runs only when it is started in the UI or by `prefect deployment run`."""
    paused: bool | None = None
    """Whether its schedule rests; null leaves it as it is, which for a new one is false."""
    max_lateness_minutes: float = Field(default=60, gt=0, le=10_000_000)
    """A run that starts later than this after its scheduled time does nothing."""
    tags: list[Tag] = []
    description: str = ""


class TrialDeployment(Strict):
    """The deployment `trial/NAME`, whose runs are the trials of sweeps with `engine: work-pool`."""

    enabled: bool = False
    name: str = Field(default="trial", pattern=r"^[^/]+$")
    tags: list[Tag] = []


class Serve(Strict):
    """What `distilllens serve` offers."""

    deployments: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], Deployment] = Field(min_length=1)
    trial: TrialDeployment = TrialDeployment()
    limit: int = Field(default=5, ge=1, le=1000)
    """Runs at a time over all deployments, where this process executes them; a worker has its own `--limit`."""
    port: int = Field(default=4200, ge=1, le=65535)
    """Loopback port of the Prefect server that is started where none is configured (PREFECT_API_URL)."""

    @model_validator(mode="after")
    def _a_sweep_does_not_wait_for_itself(self) -> Serve:
        if self.trial.enabled and self.limit < 2:
            raise ValueError("limit: 1 leaves no place for a trial beside the sweep that waits for it; give 2 or more")
        return self


def load_serve(path: Path, run_dir: Path) -> Serve:
    """Read a file of deployments; every path in it comes back absolute.

    Args:
        path: YAML file.
        run_dir: of the deployments that name none.

    Raises:
        ConfigError: anything is wrong; all problems at once.
    """
    settings = validate(Serve, read_yaml(path), str(path))
    folder = path.resolve().parent

    def resolved(deployment: Deployment) -> Deployment:
        own = run_dir.resolve() if deployment.run_dir is None else (folder / deployment.run_dir).resolve()
        return deployment.model_copy(update={"config": (folder / deployment.config).resolve(), "run_dir": own})

    deployments: Mapping[str, Deployment] = {name: resolved(item) for name, item in settings.deployments.items()}
    return settings.model_copy(update={"deployments": deployments})


def parameters_of(deployment: Deployment) -> Parameters:
    """What its runs are started with, unless someone changes it in the UI."""
    return Parameters(
        config=str(deployment.config),
        overrides=deployment.overrides,
        run_dir=str(deployment.run_dir),
        max_lateness_minutes=deployment.max_lateness_minutes,
    )
