"""What is too large for any use is refused at once, with the limit; nothing of that size is ever made."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import experiment
import pytest
import yaml

from pipeline.config import load_experiment
from pipeline.config.base import MAX_ITEMS, MAX_LETTERS, MAX_NUMBER, beyond_limits
from pipeline.config.experiment import MAX_EVALUATIONS
from pipeline.config.loading import load_sweep
from pipeline.config.sweep import MAX_POINTS, Sweep
from pipeline.errors import ConfigError
from pipeline.sweeps.points import fixed_points


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiment.write(tmp_path_factory.mktemp("limits"))


def refused(path: Path, *overrides: str) -> str:
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    assert time.process_time() - before < 30 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000
    return str(caught.value)


HUGE = 10**18


@pytest.mark.parametrize(
    "name",
    [
        "train.batch_size", "train.max_steps", "train.warmup_steps", "train.checkpoint_every", "train.micro_batch_size",
        "data.max_tokens", "data.max_prompt_tokens", "data.train.first", "data.train.skip", "data.held_out.dev",
        "evaluation.batch_size", "evaluation.decoding.max_new_tokens", "evaluation.decoding.no_repeat_ngram_size",
        "validation.rows", "validation.every_steps", "validation.batch_size", "cache.shard_mib", "cache.batch_size",
        "student.keep_layers", "student.calibration_rows", "methods.distilllens.lens.pairs.count",
    ],
)  # fmt: skip
def test_a_count_has_a_limit(path: Path, name: str) -> None:
    extra = ["train.batch_size=1000000000000"] if name == "train.micro_batch_size" else []
    message = refused(path, f"{name}={HUGE}", *extra)
    assert f"{name}: {HUGE} is beyond {MAX_NUMBER}, the most that a setting can be; lower it" in message or (
        "micro" in name and "micro_batch_size" in message
    )


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        ("student", {"kind": "scratch", "layers": HUGE}, 1000),
        ("student", {"kind": "scratch", "layers": 2, "hidden_size": HUGE}, 1_000_000),
        ("student", {"kind": "scratch", "layers": 2, "intermediate_size": HUGE}, 10_000_000),
        ("student", {"kind": "scratch", "layers": 2, "heads": HUGE}, 10_000),
        ("train.lora", {"rank": HUGE}, 65_536),
        ("train.launch", {"processes": HUGE}, 1024),
        ("train", {"epochs": 1e300}, 1_000_000),
        ("evaluation.metrics.judge", {"base_url": "http://x", "model": "m", "max_requests": 1, "workers": HUGE}, 256),
        (
            "evaluation.metrics.judge",
            {"base_url": "http://x", "model": "m", "max_requests": 1, "timeout_seconds": 1e300},
            86_400,
        ),
        ("cache", {"parts": HUGE}, 999),
    ],
)
def test_what_is_made_in_that_number_has_a_lower_one(path: Path, name: str, value: Any, most: int) -> None:
    message = refused(path, f"{name}={yaml.safe_dump(value, default_flow_style=True)}")
    assert f"less than or equal to {most}" in message and f"  - {name}." in message


@pytest.mark.parametrize("name", ["train.seeds", "evaluation.seeds", "benchmarks.general.seeds"])
def test_seeds_are_few_and_not_negative(path: Path, name: str) -> None:
    assert f"{name}: List should have at most 1000 items" in refused(path, f"{name}={list(range(1001))}")
    assert f"{name}.0: Input should be greater than or equal to 0 (found -1)" in refused(path, f"{name}=[-1]")
    load_experiment(path, [f"{name}=[{2**62}]"])


@pytest.mark.parametrize(("name", "value"), [("methods", {"kind": "kd"}), ("benchmarks", {"source": {"path": "x.jsonl"}})])
def test_methods_and_benchmarks_are_few(path: Path, name: str, value: dict[str, Any]) -> None:
    many = {f"n{index}": value for index in range(101)}
    assert f"{name}: Dictionary should have at most 100 items" in refused(path, f"{name}={yaml.safe_dump(many)}")


def test_all_together_are_few(path: Path) -> None:
    message = refused(
        path,
        f"train.seeds={list(range(1000))}",
        "methods={kd: null, sft: null, rkl: null, jsd: null, akl: null, x: {kind: kd}}",
    )
    assert (
        f"6 methods × 1000 seeds × 2 benchmarks are 12000 evaluations, but one experiment has at most {MAX_EVALUATIONS}"
        in message
    )
    assert "lower one of them" in message


@pytest.mark.parametrize("name", ["description", "baseline", "data.train.path", "evaluation.metrics.judge.model"])
def test_texts_are_short_and_can_be_shown(path: Path, name: str) -> None:
    extra = ["evaluation.metrics.judge={base_url: 'http://x', model: m, max_requests: 1}"] if "judge" in name else []
    for text, message in (
        ("x" * (MAX_LETTERS + 1), f"{MAX_LETTERS + 1} characters, but a text has at most {MAX_LETTERS}; shorten it"),
        ("a\x1b[2J", "'\\x1b' at character 2 cannot be shown; remove it"),
        ("a\u202eb", "'\\u202e' at character 2 cannot be shown; remove it"),
    ):
        found = refused(path, *extra, f"{name}={yaml.safe_dump(text, width=10**6)}")
        assert name in found and all(letter.isprintable() or letter == "\n" for letter in found)
        assert message in found or name in ("baseline", "data.train.path")  # a check of its own comes first


def test_everything_in_a_setting_is_looked_at() -> None:
    assert not list(beyond_limits({"a": [1, "text\nwith\ttabs 👩‍🚀 ‏", {"b": None}, True], "seeds": [2**70]}))
    assert list(beyond_limits({"a": [0, {"b\x00": 1}]})) == [
        "a.1.a name in it: '\\x00' at character 2 cannot be shown; remove it"
    ]
    assert list(beyond_limits([0] * (MAX_ITEMS + 1), ("a",))) == [
        f"a: {MAX_ITEMS + 1} entries, but there are at most {MAX_ITEMS}; leave some out"
    ]
    assert list(beyond_limits({"a": -HUGE})) == [f"a: {-HUGE} is beyond {MAX_NUMBER}, the most that a setting can be; lower it"]


# Sweeps


def sweep(axes: dict[str, Any], search: dict[str, Any]) -> Sweep:
    return Sweep.model_validate({"name": "s", "experiment": "e.yaml", "axes": axes, "search": search})


def test_a_grid_of_a_billion_points_is_refused_before_it_is_built() -> None:
    axes = {f"a{index}": list(range(1000)) for index in range(3)}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        fixed_points(sweep(axes, {"kind": "grid"}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000
    assert (
        f"axes: a grid of 1000000000 points, but a sweep has at most {MAX_POINTS}; give fewer values, or search.kind: random "
        "with search.points" in str(caught.value)
    )
    assert len(fixed_points(sweep({"a": list(range(40)), "b": list(range(25))}, {"kind": "grid"}))) == MAX_POINTS


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_searches_have_as_many_points_as_grids(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sweep.yaml"
    content = {"name": "s", "experiment": "e.yaml", "axes": {"a": [1, 2]}, "search": {"kind": kind, "points": HUGE}}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=rf"search.points: Input should be less than or equal to {MAX_POINTS}"):
        load_sweep(path)


@pytest.mark.parametrize(
    ("setting", "most"),
    [
        ({"concurrency": HUGE}, 1000),
        ({"trial": {"retries": HUGE}}, 100),
        ({"trial": {"threads": HUGE}}, 4096),
        ({"trial": {"gpus": HUGE}}, 1024),
        ({"trial": {"time_limit_minutes": 1e300}}, 1_000_000),
        ({"budget": {"hours": 1e300}}, 100_000),
    ],
)
def test_what_carries_a_sweep_out_is_limited(tmp_path: Path, setting: dict[str, Any], most: int) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "experiment": "e.yaml", **setting}))
    with pytest.raises(ConfigError, match=f"less than or equal to {most}"):
        load_sweep(path)
