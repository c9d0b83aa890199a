from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.loading import load_sweep
from pipeline.config.sweep import LocalEngine, Range, RayEngine, Values
from pipeline.errors import ConfigError

MINIMAL: dict[str, Any] = {"name": "s", "experiment": "base.yaml"}


def load(folder: Path, **content: Any) -> Any:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **content}), encoding="utf-8")
    return load_sweep(path)


def refused(folder: Path, **content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **content)
    return str(caught.value)


def test_the_base_experiment_is_found_beside_the_sweep(tmp_path: Path) -> None:
    assert load(tmp_path).experiment == tmp_path / "base.yaml"


def test_axes_take_a_list_values_or_a_range(tmp_path: Path) -> None:
    axes = {"a": [1, 2], "b": {"values": ["x"], "when": {"a": 1}}, "c": {"low": 1, "high": 2, "log": True}}
    sweep = load(tmp_path, axes=axes, search={"kind": "random", "points": 3})
    assert sweep.axes["a"] == Values(values=[1, 2]) and sweep.axes["b"].when == {"a": 1}
    assert sweep.axes["c"] == Range(low=1, high=2, log=True)


def test_an_engine_is_a_name_or_a_mapping(tmp_path: Path) -> None:
    assert load(tmp_path).engine == load(tmp_path, engine="local").engine == LocalEngine()
    assert load(tmp_path, engine={"kind": "ray", "gpus_per_trial": 0.5}).engine == RayEngine(gpus_per_trial=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"a": {"low": 1, "high": 2}}}, "axes.a is a range, of which search.kind: grid cannot try all"),
        ({"axes": {"a": {"low": 2, "high": 1}}, "search": {"kind": "random", "points": 1}}, "low 2 must be below high 1"),
        ({"axes": {"a": {"low": 0, "high": 1, "log": True}}}, "low 0 must be above 0"),
        ({"axes": {"a": {"low": 0.5, "high": 2, "integer": True}}}, "must be whole numbers"),
        ({"axes": {"a": {"values": [1], "when": {"b": 1}}, "b": [1]}}, "axes.a.when: 'b' is no axis before it"),
        ({"axes": {"a": []}}, "axes.a.values"),
        ({"axes": {"a": [1]}, "search": {"kind": "list", "points": [{}]}}, "axes and search.points both say"),
        ({"search": {"kind": "gird"}}, "did you mean grid?"),
        ({"engine": "slurm"}, "engine.kind: 'slurm' is not known"),
        ({"budget": {"hour": 1}}, "budget.hour: unknown key; did you mean hours?"),
        ({"concurrency": 0}, "concurrency: "),
    ],
)
def test_what_is_wrong_is_said_with_its_path(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, **content)
