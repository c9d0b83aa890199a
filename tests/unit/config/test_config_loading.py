"""Experiment files: includes, overrides, and every problem in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_experiment
from pipeline.config.data import HubData, LocalData
from pipeline.config.methods import DistillLens, Kd
from pipeline.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "teacher": {"kind": "local", "path": "teacher"},
    "student": {"kind": "pruned", "keep_layers": 2},
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
    "benchmarks": {"dolly": {"source": {"path": "test.jsonl"}}},
    "methods": {"sft": None, "distilllens": {"lens": {"weight": 2}}},
    "train": {"max_steps": 3},
}


def write(folder: Path, content: Any, name: str = "e.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def problems(folder: Path, content: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(folder, content), overrides)
    return caught.value.problems


def test_a_minimal_file_gets_the_papers_defaults(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, MINIMAL))
    method = experiment.methods["distilllens"]
    assert isinstance(method, DistillLens)
    assert (method.lens.weight, method.task, method.lens.divergence) == (2, "reverse_kl", "jensen_shannon")
    assert (experiment.alpha, experiment.data.max_prompt_tokens, experiment.data.max_tokens) == (1, 256, 512)
    assert experiment.evaluation.seeds == [10, 20, 30, 40, 50]
    assert experiment.evaluation.decoding.no_repeat_ngram_size == 6


def test_models_are_frozen(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        experiment.name = "other"  # type: ignore[misc]


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    bad = {
        **MINIMAL,
        "student": {"kind": "prunned", "keep_layers": 2},
        "data": {**MINIMAL["data"], "tempate": "alpaca"},
        "methods": {"distilllens": {"lens": {"wieght": 1}}, "kd": {"alpha": 3}},
        "train": {"max_steps": 3, "epochs": 1},
    }
    found = problems(tmp_path, bad)
    assert len(found) == 5
    text = "\n".join(found)
    assert "student.kind: 'prunned' is not known; did you mean pruned?" in text
    assert "data.tempate: unknown key; did you mean template?" in text
    assert "methods.distilllens.lens.wieght: unknown key; did you mean weight?" in text
    assert "methods.kd.alpha: Input should be less than or equal to 1 (found 3)" in text
    assert "train: give exactly one of epochs and max_steps" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../escape"}, "name: "),
        ({"name": None}, "name: "),
        ({"teacher": {"kind": "local"}}, "teacher.path: missing"),
        ({"teacher": {"repo": "a/b"}}, "teacher: needs a `kind`"),
        ({"teacher": {"kind": "package", "package": "p", "gguf_file": "../x.gguf"}}, "teacher.gguf_file: "),
        ({"methods": {}}, "methods: "),
        ({"methods": {"teacher": {"kind": "kd"}}}, "names of rows that every table has"),
        ({"methods": {"mine": {}}}, "methods.mine: needs a `kind`"),
        ({"methods": {"kd": {"alpha": 0.5}}}, "methods.kd.alpha differs from alpha=1.0, but fair: true"),
        ({"train": {"max_steps": 3, "seeds": [1, 1]}}, "repeats a seed"),
        ({"train": {"max_steps": 3, "micro_batch_size": 9}}, "micro_batch_size 9 is larger than batch_size 8"),
        ({"train": {"max_steps": 3, "learning_rate": float("nan")}}, "train.learning_rate: "),
        (
            {"methods": {"distilllens": {"lens": {"token_fraction": 0.5, "mask_layout": "official"}}}},
            "methods.distilllens.lens: token_fraction 0.5 goes with mask_layout aligned only",
        ),
        ({"benchmarks": {"dolly": {"source": {"kind": "held_out", "part": "test"}}}}, "data.held_out.test is 0"),
        ({"include": "x.yaml"}, "include: 'x.yaml' must be a list"),
        ({"include": ["absent.yaml"]}, "cannot be read"),
    ],
)
def test_bad_values_name_their_path(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems(tmp_path, {**MINIMAL, **change}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: " + "[" * 5000, "not YAML"),
        ("x: " + "y" * (1 << 20), "an experiment file has at most"),
        ("a: " + "{b: " * 40 + "1" + "}" * 40, "nested deeper"),
        ("1: 2", "must be a mapping"),
    ],
)
def test_files_that_are_no_experiment(tmp_path: Path, content: str, message: str) -> None:
    assert any(message in problem for problem in problems(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_experiment(tmp_path / "nowhere.yaml")


def test_includes_merge_and_the_including_file_wins(tmp_path: Path) -> None:
    write(tmp_path, {**MINIMAL, "train": {"max_steps": 3, "batch_size": 4}}, "base.yaml")
    experiment = load_experiment(write(tmp_path, {"include": ["base.yaml"], "train": {"max_steps": 7}}))
    assert (experiment.train.max_steps, experiment.train.batch_size) == (7, 4)


def test_another_kind_replaces_and_does_not_merge(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    hub = {"kind": "hub", "repo": "o/n", "file": "raw.jsonl", "revision": "main"}
    content = {"include": ["base.yaml"], "data": {"train": hub}}
    write(tmp_path, {**MINIMAL, "data": {**MINIMAL["data"], "train": {"kind": "local", "path": "x"}}}, "base.yaml")
    assert isinstance(load_experiment(write(tmp_path, content)).data.train, HubData)


def test_an_include_cycle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"include": ["b.yaml"]}, "a.yaml")
    write(tmp_path, {"include": ["a.yaml"]}, "b.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        load_experiment(tmp_path / "a.yaml")


def test_overrides_set_nested_values_with_their_type(tmp_path: Path) -> None:
    experiment = load_experiment(
        write(tmp_path, MINIMAL), ["train.seeds=[1, 2]", "methods.kd.kind=kd", "fair=false", "alpha=0.25"]
    )
    assert experiment.train.seeds == [1, 2] and isinstance(experiment.methods["kd"], Kd) and experiment.alpha == 0.25


def test_a_path_turns_any_source_into_a_local_one_and_keeps_limits_given_with_it(tmp_path: Path) -> None:
    hub = {"kind": "hub", "repo": "o/n", "file": "raw.jsonl", "revision": "main", "skip": 1000}
    content = {**MINIMAL, "data": {**MINIMAL["data"], "train": hub}}
    source = load_experiment(write(tmp_path, content), ["data.train.first=64", "data.train.path=rows.csv"]).data.train
    assert source == LocalData(kind="local", path=Path("rows.csv"), first=64)


def test_a_benchmark_set_to_null_is_left_out(tmp_path: Path) -> None:
    content = {**MINIMAL, "benchmarks": {**MINIMAL["benchmarks"], "vicuna": {"source": {"path": "v.jsonl"}}}}
    assert list(load_experiment(write(tmp_path, content), ["benchmarks.dolly=null"]).benchmarks) == ["vicuna"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "dotted.path=value"),
        ("a..b=1", "dotted.path=value"),
        ("name.x=1", "has no keys"),
        ("x=[", "not YAML"),
        ("nope=1", "unknown key"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert any(message in problem for problem in problems(tmp_path, MINIMAL, override))


def test_every_shipped_experiment_loads() -> None:
    configs = Path(__file__).resolve().parents[3] / "configs"
    files = [
        configs / "quickstart.yaml",
        *sorted((configs / "experiments").glob("*.yaml")),
        *sorted((configs / "paper").glob("*.yaml")),
    ]
    assert len(files) >= 3
    for file in files:
        assert load_experiment(file).methods
