"""Experiment files: includes, overrides, and every problem in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_experiment
from pipeline.config.data import HubData, LocalData
from pipeline.config.methods import METHOD_KINDS, DistillLens, Kd
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
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


def test_unfair_methods_have_budgets_of_their_own(tmp_path: Path) -> None:
    train = {"max_steps": 3, "batch_size": 8, "micro_batch_size": 4}
    own = {"epochs": 2, "batch_size": 2, "learning_rate": [1e-4, 2e-4], "schedule": "linear"}
    content = {**MINIMAL, "fair": False, "train": train, "methods": {"sft": None, "kd": {"train": own, "alpha": 0.5}}}
    experiment = load_experiment(write(tmp_path, content))
    assert experiment.training_of("sft") == experiment.train
    kd = experiment.training_of("kd")
    assert (kd.epochs, kd.max_steps, kd.batch_size, kd.micro_batch_size) == (2, None, 2, 2)
    assert (kd.learning_rates, kd.schedule, kd.weight_decay) == ([1e-4, 2e-4], "linear", experiment.train.weight_decay)
    assert (experiment.alpha_of("kd"), experiment.alpha_of("sft")) == (0.5, 0)


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
        (
            {"methods": {"distilllens": {"lens": {"layer_weights": [1, 2]}}}},
            "methods.distilllens.lens: layer_weights has 2 values for 5 pairs",
        ),
        (
            {"methods": {"distilllens": {"lens": {"pairs": {"kind": "last", "count": 2}, "layer_weights": [0, 0]}}}},
            "methods.distilllens.lens: layer_weights are all 0",
        ),
        (
            {"methods": {"distilllens": {"lens": {"pairs": {"kind": "last", "count": 2}, "layer_weights": [1, -1]}}}},
            "methods.distilllens.lens.layer_weights.1: Input should be greater than or equal to 0 (found -1)",
        ),
        ({"methods": {"kd": {"train": {"epochs": 2}}}}, "methods.kd.train sets a budget of its own, but fair: true"),
        (
            {"fair": False, "methods": {"kd": {"train": {"min_learning_rate": 1}}}},
            "methods.kd.train: together with train, min_learning_rate 1.0 is above learning_rate 5e-05",
        ),
        ({"fair": False, "methods": {"sft": {"train": {"seeds": [1]}}}}, "methods.sft.train.seeds: unknown key"),
        ({"methods": {"sft": {"alpha": 0.5}}}, "methods.sft.alpha: unknown key"),
        ({"train": {"max_steps": 3, "learning_rate": []}}, "train.learning_rate: give at least one learning rate"),
        ({"train": {"max_steps": 3, "learning_rate": [1, 1]}}, "train.learning_rate: give at least one learning rate"),
        ({"train": {"max_steps": 3, "learning_rate": [1, 0]}}, "train.learning_rate: must be a number above 0, or a list"),
        ({"train": {"max_steps": 3, "learning_rate": "fast"}}, "train.learning_rate: must be a number above 0, or a list"),
        (
            {"train": {"max_steps": 3, "learning_rate": [1, 2]}, "validation": {"select": "last"}},
            "train.learning_rate [1.0, 2.0] is a search, but validation.select: last",
        ),
        ({"teacher_finetune": {"train": {"epochs": 1, "seeds": [1, 2]}}}, "teacher_finetune: train.seeds [1, 2]: there is one"),
        (
            {"teacher_finetune": {"train": {"epochs": 1, "learning_rate": [1, 2]}, "validation": {"select": "last"}}},
            "teacher_finetune: train.learning_rate [1.0, 2.0] is a search",
        ),
        (
            {"methods": {"distilllens": {"on_policy": {"fraction": 0.5}}}},
            "methods.distilllens.on_policy trains on rows that are sampled while it trains, so cache.enabled: true cannot",
        ),
        (
            {"methods": {"kd": {"on_policy": {"fraction": 0.5}}}, "cache": {"enabled": False}, "alpha": 0.5},
            "methods.kd.on_policy goes with alpha 1, here it is 0.5",
        ),
        ({"methods": {"seqkd": {"on_policy": {"fraction": 0.5}}}}, "methods.seqkd.on_policy: unknown key"),
        ({"methods": {"kd": {"on_policy": {"fraction": 0}}}}, "methods.kd.on_policy.fraction: "),
        (
            {"teacher_finetune": {"train": {"epochs": 1, "lora": {}}}},
            "teacher_finetune: train.lora.save_merged is false, but everything after this reads the tuned teacher as a whole",
        ),
        (
            {"evaluation": {"metrics": {"exposure_bias": {"lengths": [4, 2]}}}},
            "evaluation.metrics.exposure_bias: lengths [4, 2] must ascend",
        ),
        (
            {"evaluation": {"metrics": {"judge": {"base_url": "http://u:p@h/v1", "model": "j", "max_requests": 1}}}},
            "evaluation.metrics.judge.base_url: ",
        ),
        ({"evaluation": {"metrics": {"judge": {"base_url": "http://h/v1", "model": "j"}}}}, "max_requests: missing"),
        (
            {"evaluation": {"metrics": {"similarity": {"model": {"kind": "package", "package": "p", "folder": "../x"}}}}},
            "evaluation.metrics.similarity.model.folder: ",
        ),
        (
            {"benchmarks": {"a": {"source": {"path": "x"}, "filter": {}}}},
            "benchmarks.a.filter: give exactly one of min_reference_tokens and min_reference_words",
        ),
        ({"benchmarks": {"a": {"source": {"path": "x"}, "seeds": [1, 1]}}}, "benchmarks.a: seeds [1, 1] repeats a seed"),
        (
            {"benchmarks": {"a": {"source": {"path": "x"}, "seeds": [1]}}, "evaluation": {"seeds": [1, 2]}},
            "evaluation.seeds is given, but every benchmark has seeds of its own; set benchmarks.a.seeds",
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


def test_a_path_over_an_included_source_makes_it_a_local_one(tmp_path: Path) -> None:
    hub = {"kind": "hub", "repo": "o/n", "file": "raw.jsonl", "revision": "main", "skip": 1000}
    write(tmp_path, {**MINIMAL, "data": {**MINIMAL["data"], "train": hub}}, "base.yaml")
    content = {"include": ["base.yaml"], "data": {"train": {"path": "rows.csv", "first": 64}}}
    source = load_experiment(write(tmp_path, content)).data.train
    assert source == LocalData(kind="local", path=Path("rows.csv"), first=64)


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
    files = [
        CONFIGS / "quickstart.yaml",
        *sorted((CONFIGS / "experiments").glob("*.yaml")),
        *sorted((CONFIGS / "paper").glob("*.yaml")),
    ]
    assert len(files) >= 3
    for file in files:
        assert load_experiment(file).methods


@pytest.mark.parametrize("name", ["quickstart", "experiments/smollm2-dolly", "experiments/smollm2-dolly15k"])
def test_an_experiment_written_down_is_the_same_experiment(tmp_path: Path, name: str) -> None:
    search = ["train.learning_rate=[1e-4, 2e-4]", "validation.select=loss"]
    overrides = ["evaluation.lens_profile=true", "train.lora={rank: 2}", *search]
    experiment = load_experiment(CONFIGS / f"{name}.yaml", overrides)
    assert load_experiment(write(tmp_path, experiment.model_dump(mode="json"))) == experiment


def test_benchmarks_with_protocols_of_their_own_are_written_down_too(tmp_path: Path) -> None:
    benchmark = {"source": {"path": "x"}, "seeds": [1], "decoding": {"max_new_tokens": 3}}
    experiment = load_experiment(write(tmp_path, {**MINIMAL, "benchmarks": {"a": benchmark}}))
    assert load_experiment(write(tmp_path, experiment.model_dump(mode="json"))) == experiment


FRAGMENTS = sorted(
    file for folder in ("data", "methods", "models", "benchmarks") for file in (CONFIGS / folder).glob("*.yaml")
)  # fmt: skip


@pytest.mark.parametrize("file", FRAGMENTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_fragment_completes_an_experiment(tmp_path: Path, file: Path) -> None:
    own = {*yaml.safe_load(file.read_text()), *(("benchmarks",) if file.parent.name == "data" else ())}
    rest = {key: value for key, value in MINIMAL.items() if key not in own}
    assert load_experiment(write(tmp_path, {**rest, "include": [str(file)]})).name == "tiny"


def test_the_nine_methods_are_there() -> None:
    nine = yaml.safe_load((CONFIGS / "methods" / "nine.yaml").read_text())["methods"]
    assert set(nine) == set(METHOD_KINDS) and len(nine) == 9
