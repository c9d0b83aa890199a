"""A sweep: a base experiment, the settings to try over it, and how its trials are carried out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.base import ExperimentName, LocalPath, Strict

METHOD, SEED = "method", "train_seed"
"""Axes that are no dotted path: a name in the experiment's methods, and one training seed."""
MAX_POINTS = 1000
"""Each is planned as an experiment of its own before anything runs."""


class Values(Strict):
    """An axis with listed values."""

    kind: Literal["values"] = "values"
    values: list[Any] = Field(min_length=1)
    when: dict[str, Any] = {}
    """Earlier axis → value, or list of values, that it must have; elsewhere this axis is left out."""


class Range(Strict):
    """An axis with a range of numbers, for random and Optuna search."""

    kind: Literal["range"] = "range"
    low: float
    high: float
    log: bool = False
    """Uniform in the logarithm."""
    integer: bool = False
    when: dict[str, Any] = {}

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 for log: true")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"low {self.low:g} and high {self.high:g} must be whole numbers for integer: true")
        return self


def _axis(value: Any) -> Any:
    if isinstance(value, list):
        return {"kind": "values", "values": value}
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "range" if {"low", "high"} & value.keys() else "values", **value}
    return value


Axis = Annotated[Annotated[Values | Range, Field(discriminator="kind")], BeforeValidator(_axis)]


class Grid(Strict):
    """Every combination."""

    kind: Literal["grid"] = "grid"


class Listed(Strict):
    """The points as they are given."""

    kind: Literal["list"] = "list"
    points: list[dict[str, Any]] = Field(min_length=1)
    """Axis → value for each."""


class RandomSearch(Strict):
    """Independent draws; raising `points` keeps the earlier ones."""

    kind: Literal["random"] = "random"
    points: int = Field(ge=1, le=MAX_POINTS)
    seed: int = 0


class OptunaSearch(Strict):
    """Tree-structured Parzen estimator on the validation metric (Bergstra et al. 2011; Optuna): never on test scores."""

    kind: Literal["optuna"] = "optuna"
    points: int = Field(ge=1, le=MAX_POINTS)
    seed: int = 0
    batch: int = Field(default=1, ge=1, le=MAX_POINTS)
    """Points suggested at a time, before any of them has a result; give the concurrency."""


Search = Annotated[Grid | Listed | RandomSearch | OptunaSearch, Field(discriminator="kind")]


class LocalEngine(Strict):
    """Trials on this machine."""

    kind: Literal["local"] = "local"


class DaskEngine(Strict):
    """Trials on the workers of a Dask cluster, one at a time each (prefect-dask)."""

    kind: Literal["dask"] = "dask"
    address: str | None = None
    """null starts a cluster of `concurrency` workers on this machine."""


class RayEngine(Strict):
    """Trials on a Ray cluster (prefect-ray)."""

    kind: Literal["ray"] = "ray"
    address: str | None = None
    """null starts Ray on this machine."""
    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float = Field(default=0, ge=0)


class WorkPoolEngine(Strict):
    """Each trial a flow run of the deployment `trial/…`, which a worker of the pool picks up (process, docker, Kubernetes)."""

    kind: Literal["work-pool"] = "work-pool"
    deployment: str = Field(default="trial/trial", pattern=r"^[^/]+/[^/]+$")
    """flow/deployment, made by `distilllens serve` or `prefect deploy`."""


def _engine(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Engine = Annotated[
    Annotated[LocalEngine | DaskEngine | RayEngine | WorkPoolEngine, Field(discriminator="kind")], BeforeValidator(_engine)
]


class TrialLimits(Strict):
    """What one trial may take."""

    time_limit_minutes: float | None = Field(default=None, gt=0, le=1_000_000)
    """The trial is stopped then and counts as failed; its checkpoint stays. null sets no limit."""
    retries: int = Field(default=1, ge=0, le=100)
    """How often a trial whose process died is started again; it goes on from its last checkpoint."""
    gpus: int = Field(default=1, ge=1, le=1024)
    """Devices of one trial, on a machine that has some."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads of one trial; null divides the machine's cores by the concurrency."""


class Budget(Strict):
    """Where a sweep stops starting trials; what is left runs when the command is given again."""

    trials: int | None = Field(default=None, ge=1)
    """Trials that one call starts."""
    hours: float | None = Field(default=None, gt=0, le=100_000)
    """Time after which one call starts no more."""


class Sweep(Strict):
    """One sweep."""

    name: ExperimentName
    """Folder under the run directory and MLflow experiment."""
    description: str = ""
    experiment: LocalPath
    """Base experiment, relative to this file."""
    overrides: dict[str, Any] = {}
    """Dotted path → value, for every trial."""
    axes: dict[str, Axis] = {}
    """Dotted path in the experiment, `method` or `train_seed` → what is tried. Without the last two every point is run with
    all methods and training seeds of the experiment."""
    search: Search = Grid()
    budget: Budget = Budget()
    concurrency: int = Field(default=1, ge=1, le=1000)
    """Trials at a time."""
    engine: Engine = LocalEngine()
    trial: TrialLimits = TrialLimits()
    baseline: str | None = None
    """Row of the table, or method, that the others are compared with; null takes the experiment's, or kd, or the first."""

    @model_validator(mode="after")
    def _axes_fit_the_search(self) -> Sweep:
        listed = isinstance(self.search, Listed)
        if listed and self.axes:
            raise ValueError("axes and search.points both say what is tried; give search.kind: list its points, or the axes")
        for name, axis in self.axes.items():
            if isinstance(axis, Range) and isinstance(self.search, Grid):
                raise ValueError(f"axes.{name} is a range, of which search.kind: grid cannot try all; give values")
        self._conditions_look_back()
        return self

    def _conditions_look_back(self) -> None:
        earlier: list[str] = []
        for name, axis in self.axes.items():
            unknown = [other for other in axis.when if other not in earlier]
            if unknown:
                raise ValueError(
                    f"axes.{name}.when: {unknown[0]!r} is no axis before it (there are: {', '.join(earlier) or '-'})"
                )
            earlier.append(name)
