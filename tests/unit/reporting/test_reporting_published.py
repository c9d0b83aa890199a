"""The paper's scores are shown where the settings are the paper's, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Experiment, load_experiment
from pipeline.reporting.paper import CONFIGS, SCORES
from pipeline.reporting.published import published

PAPER = Path(__file__).parents[3] / "configs" / "paper"
QWEN = "qwen2.5-1.5b"


def load(config: str = QWEN, *overrides: str) -> Experiment:
    return load_experiment(PAPER / f"{config}.yaml", overrides)


def test_the_papers_configuration_has_every_published_score() -> None:
    experiment = load()
    found = published(experiment)
    expected = {(score.method, score.benchmark) for score in SCORES if score.method in experiment.methods}
    assert expected and set(found) == expected
    assert found["kd", "dolly"].mean == pytest.approx(24.5226)


def test_more_training_seeds_are_no_other_configuration() -> None:
    assert published(load(QWEN, "train.seeds=[10,20,30]")) == published(load())


@pytest.mark.parametrize(
    "override",
    [
        "alpha=0.25",
        "train.batch_size=999",
        "data.max_tokens=400",
        "teacher.repo=other/teacher",
        "benchmarks.vicuna.max_prompt_tokens=99",
    ],
)
def test_another_setting_of_all_methods_leaves_none(override: str) -> None:
    assert published(load(QWEN, override)) == {}


def test_a_methods_own_setting_leaves_out_that_method() -> None:
    found = published(load(QWEN, "methods.distilllens.lens.weight=0.5"))
    assert {method for method, _ in published(load())} - {method for method, _ in found} == {"distilllens"}


def test_a_benchmark_of_another_source_is_left_out() -> None:
    found = published(load(QWEN, "benchmarks.dolly.source.repo=other/dolly"))
    assert {name for _, name in published(load())} - {name for _, name in found} == {"dolly"}


@pytest.mark.parametrize("config", [name for name in CONFIGS if name != QWEN])
def test_models_without_readable_scores_have_none(config: str) -> None:
    assert published(load(config)) == {}
