from __future__ import annotations

from pathlib import Path
from typing import Any

import experiment
import pytest
import stages
import yaml

from pipeline.config.loading import load_sweep
from pipeline.errors import ConfigError
from pipeline.sweeps.plan import SweepPlan, base_settings, plan_points, plan_sweep_comparison
from pipeline.sweeps.points import fixed_points

LAMBDA = "methods.distilllens.lens.weight"


def plan(folder: Path, axes: dict[str, Any], overrides: tuple[str, ...] = (), **settings: Any) -> SweepPlan:
    experiment.write(folder)
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"name": "swept", "experiment": "experiment.yaml", "axes": axes, **settings}, sort_keys=False)
    )
    sweep = load_sweep(path)
    return plan_points(sweep, base_settings(sweep, overrides), fixed_points(sweep), folder / "runs")


def names(planned: SweepPlan) -> list[str]:
    return [trial.trial.name for trial in planned.trials]


def test_without_axes_a_sweep_is_the_experiment(tmp_path: Path) -> None:
    single = stages.planned(tmp_path)
    planned = plan(tmp_path, {})
    assert sorted(names(planned)) == sorted(trial.name for trial in single.trials)
    places = {trial.name: trial.places for trial in single.trials}
    assert all(trial.trial.places == places[trial.trial.name] for trial in planned.trials)


def test_trials_have_the_fingerprints_of_single_runs(tmp_path: Path) -> None:
    weights = {"values": [0.5, 2.0], "when": {"method": "distilllens"}}
    planned = plan(tmp_path, {"method": ["kd", "distilllens"], "train_seed": [10, 20], LAMBDA: weights})
    single = stages.planned(tmp_path, f"{LAMBDA}=2.0")
    by_name = {trial.trial.name: trial.fingerprint for trial in planned.trials}
    for method, name in (("kd", "kd s20"), ("distilllens", "distilllens weight=2 s20")):
        assert by_name[name] == stages.training(single, method, 20).place.fingerprint
    rows = ("kd s10", "kd s20", "distilllens weight=0.5 s10", "distilllens weight=2 s10", "distilllens weight=0.5 s20")
    assert names(planned) == ["teacher", "untrained", *rows, "distilllens weight=2 s20"]


def test_an_axis_of_another_method_gives_no_second_trial(tmp_path: Path) -> None:
    planned = plan(tmp_path, {"method": ["kd", "distilllens"], "train_seed": [10], LAMBDA: [0.5, 2.0]})
    assert sorted(names(planned)) == sorted(
        ["teacher", "untrained", "kd s10", "distilllens weight=0.5 s10", "distilllens weight=2 s10"]
    )
    assert planned.asked == 4
    assert [[planned.trials[index].trial.name for index in rows] for rows in planned.rows] == [
        ["kd s10"], ["kd s10"], ["distilllens weight=0.5 s10"], ["distilllens weight=2 s10"],
    ]  # fmt: skip


def test_all_trials_read_one_cache(tmp_path: Path) -> None:
    counts = {"methods.distilllens.lens.pairs.count": {"values": [1, 2], "when": {"method": "distilllens"}}}
    planned = plan(tmp_path, {"method": ["kd", "distilllens"], "train_seed": [10], **counts})
    caches = {trial.plan.cache.place.fingerprint for trial in planned.trials if trial.plan.cache is not None}
    assert len(caches) == 1
    (single,) = [t for t in planned.trials if t.trial.name == "distilllens count=2 s10"]
    assert single.trial.train is not None and single.trial.train.cache is not None
    assert set(stages.planned(tmp_path).cache.key.layers) >= set(single.trial.train.cache.key.layers)  # type: ignore[union-attr]


def test_students_have_untrained_rows_of_their_own(tmp_path: Path) -> None:
    planned = plan(tmp_path, {"method": ["kd"], "train_seed": [10], "student.keep_layers": [2, 3]})
    assert sorted(names(planned)) == sorted(
        ["teacher", "untrained keep_layers=2", "untrained keep_layers=3", "kd keep_layers=2 s10", "kd keep_layers=3 s10"]
    )
    sweep = load_sweep(tmp_path / "sweep.yaml")
    comparison = plan_sweep_comparison(sweep, base_settings(sweep, ()), planned.trials, tmp_path / "runs")
    assert comparison.experiment.fair is False and comparison.experiment.name == "swept"
    assert comparison.place.path == tmp_path / "runs" / "swept" / "comparison"


def test_names_of_axes_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    axes = {
        "method": ["distilllens"],
        "train_seed": [10],
        LAMBDA: [2.0],
        "train.weight_decay": [0.1],
        "methods.distilllens.lens.final_norm": [True],
    }
    assert "distilllens weight=2, weight_decay=0.1, final_norm=true s10" in names(plan(tmp_path, axes))
    twins = {"method": ["distilllens"], "train_seed": [10], "validation.rows": [2], "evaluation.lens_profile.rows": [1]}
    assert "distilllens validation.rows=2, lens_profile.rows=1 s10" in names(plan(tmp_path, twins))


def test_the_command_line_changes_the_base(tmp_path: Path) -> None:
    single = stages.planned(tmp_path, "train.max_steps=2")
    planned = plan(tmp_path, {"method": ["kd"], "train_seed": [10]}, ("train.max_steps=2",))
    assert planned.trials[-1].fingerprint == stages.training(single, "kd").place.fingerprint


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"method": ["kdd"]}, r"'kdd' is not in the experiment's methods"),
        ({"method": [{"kd": 1}]}, r"method: {'kd': 1} is not in the experiment's methods"),
        ({"train.learning_rate": [-1.0, 1e-3]}, r"at train.learning_rate=-1: train.learning_rate: must be a number above 0"),
        ({"methods.distilllens.lens.wieght": [1.0]}, r"wieght: unknown key; did you mean weight"),
    ],
)
def test_wrong_settings_of_points_are_said_together(tmp_path: Path, axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, axes)


def test_the_message_stays_short_whatever_the_points_hold(tmp_path: Path) -> None:
    endless = {f"k{number}": number for number in range(2000)}
    with pytest.raises(ConfigError, match=r"at train.learning_rate=\{.*…: train.learning_rate: ") as refused:
        plan(tmp_path, {"train.learning_rate": [endless]})
    assert len(str(refused.value)) < 2000
    with pytest.raises(ConfigError, match="and 170 more; mend these first") as refused:
        plan(tmp_path, {"train.learning_rate": [-float(number) for number in range(1, 201)]})
    assert len(refused.value.problems) == 31


def test_optuna_needs_a_validation_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation.select: last gives nothing to optimise"):
        plan(tmp_path, {"train.learning_rate": [1e-3]}, ("validation.select=last",), search={"kind": "optuna", "points": 1})
