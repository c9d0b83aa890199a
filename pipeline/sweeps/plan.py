"""A sweep's points as trials, each fingerprinted like a single run, with the artifacts that they share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.config.loading import apply_overrides, apply_settings, first_problems, read_yaml, shown, validate
from pipeline.config.sweep import METHOD, SEED, OptunaSearch, Sweep
from pipeline.errors import ConfigError
from pipeline.plan import Plan, check_inputs, plan_experiment
from pipeline.stages.compare import ComparePlan, Trial, plan_comparison
from pipeline.sweeps.points import Point, fixed_points

_OF_ONE_METHOD = ("methods", "train", "alpha", "fair", "validation", "cache", METHOD, SEED)
"""What a model that is not trained here does not depend on."""


@dataclass(frozen=True)
class SweepTrial:
    """One trial.

    Attributes:
        trial: what is trained and evaluated.
        plan: the single-method experiment that it is a part of.
        point: the settings behind it; empty for models that are not trained here.
    """

    trial: Trial
    plan: Plan
    point: Point

    @property
    def fingerprint(self) -> str:
        """Of its training; of its first evaluation where nothing is trained."""
        made = self.trial.train or self.trial.evaluations[0]
        return made.place.fingerprint


@dataclass(frozen=True)
class SweepPlan:
    """Every trial of a batch of points.

    Attributes:
        trials: without repetition, models that are not trained here first.
        asked: trials before repetition was removed.
        rows: for each point, the indices in `trials` that belong to it.
    """

    trials: tuple[SweepTrial, ...]
    asked: int
    rows: tuple[tuple[int, ...], ...]


def base_settings(sweep: Sweep, overrides: Sequence[str]) -> dict[str, Any]:
    """The base experiment as plain data, under the sweep's name, with the sweep's and the command line's overrides.

    Raises:
        ConfigError: the file cannot be read, or it is no experiment.
    """
    raw = apply_settings(apply_overrides(read_yaml(sweep.experiment), overrides), sweep.overrides)
    raw = {**raw, "name": sweep.name, "description": sweep.description or raw.get("description", "")}
    experiment = validate(Experiment, raw, str(sweep.experiment))
    if isinstance(sweep.search, OptunaSearch) and experiment.validation.select == "last":
        raise ConfigError(
            "search.kind is optuna, but validation.select: last gives nothing to optimise; set it to loss or rouge_l",
            sweep.name,
        )
    return raw


@dataclass(frozen=True)
class Known:
    """What is known of a sweep before anything runs.

    Attributes:
        plan: every trial; of a search that chooses by results, the base's.
        comparison: of these trials.
        whole: whether there are no others.
    """

    plan: SweepPlan
    comparison: ComparePlan
    whole: bool


def plan_known(sweep: Sweep, overrides: Sequence[str], run_dir: Path) -> Known:
    """Plan as much of a sweep as is known before it runs.

    Raises:
        ConfigError: see `base_settings` and `plan_points`.
    """
    base, points = base_settings(sweep, overrides), fixed_points(sweep)
    plan = plan_points(sweep, base, points or [{}], run_dir)
    return Known(plan, plan_sweep_comparison(sweep, base, plan.trials, run_dir), whole=bool(points))


def plan_points(sweep: Sweep, base: dict[str, Any], points: Sequence[Point], run_dir: Path) -> SweepPlan:
    """Plan every trial of some points.

    Args:
        sweep: the sweep.
        base: see `base_settings`.
        points: settings to try.
        run_dir: where artifacts go.

    Raises:
        ConfigError: a point's settings are wrong, all of them at once; further as `pipeline.plan.plan_experiment`.
    """
    experiments = _experiments(sweep, base, points)
    plans = _sharing_states([plan_experiment(experiment, run_dir) for experiment in experiments])
    names = _short_names(points)
    found: dict[str, SweepTrial] = {}
    asked, rows = 0, []
    for point, plan in zip(points, plans, strict=True):
        mine = []
        for trial in plan.trials:
            settings = {name: value for name, value in point.items() if _belongs(name, trial)}
            named = SweepTrial(replace(trial, variant=_variant(settings, names)), plan, settings)
            key = f"{named.fingerprint} {trial.method if trial.train is None else ''}"
            if trial.train is not None:
                asked += 1
                mine.append(key)
            found.setdefault(key, named)
        rows.append(mine)
    ordered = sorted(found, key=lambda key: found[key].trial.train is not None)
    index = {key: position for position, key in enumerate(ordered)}
    trials = tuple(found[key] for key in ordered)
    return SweepPlan(trials, asked, tuple(tuple(dict.fromkeys(index[key] for key in mine)) for mine in rows))


def base_experiment(base: dict[str, Any]) -> Experiment:
    """The experiment of `base_settings`."""
    return validate(Experiment, base, "the base experiment")


def minimises(base: dict[str, Any]) -> bool:
    """Whether a smaller value of the validation metric is better."""
    return base_experiment(base).validation.select == "loss"


def plan_sweep_comparison(sweep: Sweep, settings: dict[str, Any], trials: Iterable[SweepTrial], run_dir: Path) -> ComparePlan:
    """The comparison of finished trials, at RUN_DIR/NAME/comparison."""
    base, chosen = base_experiment(settings), list(trials)
    seeds = list(dict.fromkeys(t.trial.seed for t in chosen if t.trial.seed is not None))
    shared = {name for t in chosen for name in t.point if name.split(".")[0] not in ("methods", METHOD, SEED)}
    # Where the budget itself was varied, rows do not have equal budgets.
    experiment = base.model_copy(
        update={"train": base.train.model_copy(update={"seeds": seeds or base.train.seeds}), "fair": base.fair and not shared}
    )
    return plan_comparison(experiment, [t.trial for t in chosen], run_dir / "artifacts", run_dir, sweep.baseline)


def check_points(plan: SweepPlan) -> None:
    """Check the inputs of every trial that is to do, before any work starts; see `pipeline.plan.check_inputs`.

    Raises:
        DataError, ModelError, ConfigError: see there.
    """
    checked = set()
    for trial in plan.trials:
        own = trial.plan
        key = (own.data.place.fingerprint, own.student.place.fingerprint, own.experiment.train.batch_size)
        if key not in checked and not trial.trial.finished():
            checked.add(key)
            check_inputs(own)


def _experiments(sweep: Sweep, base: dict[str, Any], points: Sequence[Point]) -> list[Experiment]:
    experiments, problems = [], []
    for point in points:
        where = f"at {shown(_variant(point, {})) or 'the base'}"
        try:
            experiments.append(validate(Experiment, _settings(base, point), where))
        except ConfigError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(first_problems(list(dict.fromkeys(problems))), f"sweep {sweep.name}")
    return experiments


def _settings(base: dict[str, Any], point: Point) -> dict[str, Any]:
    """The base experiment with a point's settings, and with its method and training seed alone if it names them."""
    methods: dict[str, Any] = base.get("methods") or {}
    if METHOD in point and not (isinstance(point[METHOD], str) and point[METHOD] in methods):
        method = shown(repr(point[METHOD]))
        raise ConfigError(f"{METHOD}: {method} is not in the experiment's methods ({', '.join(methods)}); add it there")
    own = {name: value for name, value in point.items() if name not in (METHOD, SEED)}
    if METHOD in point:
        own = {name: value for name, value in own.items() if not name.startswith("methods.") or _of(name, point[METHOD])}
    raw = apply_settings(base, own)
    if METHOD in point:
        raw = {**raw, "methods": {point[METHOD]: raw["methods"][point[METHOD]]}}
    if SEED in point:
        raw = apply_settings(raw, {"train.seeds": [point[SEED]]})
    return raw


def _sharing_states(plans: list[Plan]) -> list[Plan]:
    """The plans with one teacher cache for all that read the same teacher's states of the same rows."""
    layers: dict[str, set[int]] = {}
    for plan in plans:
        if plan.cache is not None:
            layers.setdefault(_states(plan), set()).update(plan.cache.key.layers)
    shared = []
    for plan in plans:
        missing = sorted(layers[_states(plan)] - set(plan.cache.key.layers)) if plan.cache is not None else []
        if missing:
            states = plan.experiment.cache
            update = {"cache": states.model_copy(update={"extra_layers": sorted({*states.extra_layers, *missing})})}
            plan = plan_experiment(plan.experiment.model_copy(update=update), plan.run_dir)
        shared.append(plan)
    return shared


def _states(plan: Plan) -> str:
    assert plan.cache is not None
    return json.dumps([dict(plan.cache.place.upstream), plan.cache.key.dtype], sort_keys=True)


def _belongs(name: str, trial: Trial) -> bool:
    """Whether an axis says something about a trial's row."""
    if name in (METHOD, SEED):
        return False
    head = name.split(".")[0]
    if trial.train is None:
        return head not in _OF_ONE_METHOD and (head, trial.method) != ("student", "teacher")
    return head != "methods" or _of(name, trial.method)


def _of(name: str, method: str) -> bool:
    return name == f"methods.{method}" or name.startswith(f"methods.{method}.")


def _variant(settings: Point, names: Mapping[str, str]) -> str:
    return ", ".join(f"{names.get(name, name)}={_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _short_names(points: Sequence[Point]) -> dict[str, str]:
    """Dotted path → its shortest ending that no other axis has."""
    paths = list(dict.fromkeys(name for point in points for name in point))
    endings = {path: [".".join(path.split(".")[-count:]) for count in range(1, path.count(".") + 2)] for path in paths}
    short = {}
    for path, own in endings.items():
        taken = {ending for other, theirs in endings.items() if other != path for ending in theirs}
        short[path] = next((ending for ending in own if ending not in taken), path)
    return short
