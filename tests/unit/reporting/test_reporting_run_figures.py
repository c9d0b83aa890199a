"""Figures of one run beside those of others: own colour, equal axes, nothing missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
from pipeline.reporting import run_figures
from pipeline.reporting.figures import Cost
from pipeline.reporting.looks import Look
from pipeline.reporting.statistics import PromptScores

LOOK = Look("#d55e00", "o")
RUNS = ("untrained", "kd s10", "distilllens s10")


def scored(run: str, benchmark: str, values: Sequence[float]) -> PromptScores:
    return PromptScores(run, benchmark, (10,), tuple(map(str, range(len(values)))), np.array([[values]]))


def layer(student: int, teacher: int, share: float) -> LayerProfile:
    return LayerProfile(student, teacher, False, 9, share / 2, share / 4, share / 4, 1, 1, share, share / 3, 0.5)


SCORES = {run: [scored(run, "a", [10.0 * n, 20]), scored(run, "b", [40, 40])] for n, run in enumerate(RUNS, 1)}
CURVES = {run: {"dev/loss": [(2, 5.0 * n), (4, 4.0)], "train/loss": [(1, 9.0), (2, 0.1)]} for n, run in enumerate(RUNS, 1)}
COSTS = {run: Cost(10.0 * n, 5.0 * n) for n, run in enumerate(RUNS, 1)}
PROFILES = {run: [layer(2, 3, 0.2 * n), layer(4, 6, 0.1)] for n, run in enumerate(RUNS, 1)}
TOKENS = ("␣a", "↵", "$x")
HEATS = {run: LensHeat(TOKENS, ((2, 3), (4, 6)), ((0.1 * n, 0.2, 0), (0.3, 0, 0.6))) for n, run in enumerate(RUNS, 1)}

DRAWN: dict[str, Callable[[str], Figure]] = {
    "scores": lambda run: run_figures.score_figure(SCORES, run, LOOK),
    "curves": lambda run: run_figures.curve_figure(CURVES, run, LOOK),
    "cost": lambda run: run_figures.cost_figure(COSTS, run, LOOK),
    "lens": lambda run: run_figures.divergence_figure(PROFILES, run, LOOK),
    "confidence": lambda run: run_figures.confidence_figure(PROFILES, run, LOOK),
    "heat": lambda run: run_figures.heat_figure(HEATS[run]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_all_runs_have_the_same_axes_and_are_square(name: str) -> None:
    limits = []
    for run in RUNS:
        figure = DRAWN[name](run)
        figure.draw_without_rendering()
        limits.append([(axes.get_xlim(), axes.get_ylim(), axes.get_xscale(), axes.get_yscale()) for axes in figure.axes])
        assert figure.get_figwidth() == figure.get_figheight()
    assert limits[0] == limits[1] == limits[2]


@pytest.mark.parametrize("name", ["curves", "cost", "lens", "confidence"])
def test_one_run_is_in_colour_above_the_others(name: str) -> None:
    for axes in DRAWN[name]("kd s10").axes:
        lines = axes.get_lines()
        assert len(lines) == len(RUNS)
        assert [to_hex(line.get_color()) == LOOK.colour for line in lines] == [False, False, True]


def test_a_bar_stands_for_each_benchmark_with_its_interval_and_their_mean_comes_first() -> None:
    (axes,) = DRAWN["scores"]("kd s10").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mean", "a", "b"]
    assert [patch.get_width() for patch in axes.patches] == [30, 20, 40]
    reach = [segment[:, 0] for segment in axes.containers[-1].lines[2][0].get_segments()]
    # Prompts of "a" are 20 and 20: no spread; those of the first run are 10 and 20.
    assert np.allclose(reach, [[30, 30], [20, 20], [40, 40]])
    (axes,) = DRAWN["scores"]("untrained").axes
    margin = 1.96 * np.std([10, 20], ddof=1) / np.sqrt(2)
    reach = [segment[:, 0] for segment in axes.containers[-1].lines[2][0].get_segments()]
    assert np.allclose(reach[:2], [[27.5 - margin / 2, 27.5 + margin / 2], [15 - margin, 15 + margin]])


def test_the_mean_is_over_benchmarks_that_all_runs_have() -> None:
    scores = {**SCORES, "sft s10": [scored("sft s10", "b", [40, 40])]}
    (axes,) = run_figures.score_figure(scores, "kd s10", LOOK).axes
    assert [patch.get_width() for patch in axes.patches] == [40, 20, 40]
    apart = {"kd s10": SCORES["kd s10"][:1], "sft s10": scores["sft s10"]}
    (axes,) = run_figures.score_figure(apart, "kd s10", LOOK).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a"]


def test_before_and_after_training_are_named() -> None:
    legend = DRAWN["lens"]("kd s10").axes[0].get_legend()
    assert legend is not None and {text.get_text() for text in legend.get_texts()} == {"untrained", "kd s10"}
    alone = DRAWN["lens"]("untrained").axes[0].get_legend()
    assert alone is not None and [text.get_text() for text in alone.get_texts()] == ["untrained"]


def test_over_confidence_is_above_and_under_confidence_below() -> None:
    above, below = DRAWN["confidence"]("kd s10").axes
    assert list(above.get_lines()[-1].get_ydata()) == [0.4, 0.1]
    assert np.allclose(below.get_lines()[-1].get_ydata(), [0.4 / 3, 0.1 / 3])
    assert [label.get_text() for label in below.get_xticklabels()] == ["2→3", "4→6"]


def test_a_curve_far_below_another_gets_a_logarithmic_axis_and_one_that_no_run_has_no_panel() -> None:
    loss, train = DRAWN["curves"]("kd s10").axes
    assert (loss.get_yscale(), train.get_yscale()) == ("linear", "log")
    assert loss.get_title(loc="left") == "dev loss" and train.get_xlabel() == "optimiser step"


def test_the_heat_map_has_layers_tokens_and_a_scale_that_is_the_same_for_all_runs() -> None:
    for run in RUNS:
        axes, bar = DRAWN["heat"](run).axes
        (mesh,) = axes.collections
        assert mesh.get_clim() == pytest.approx((0, np.log(2)))
        np.testing.assert_allclose(mesh.get_array().reshape(2, 3), HEATS[run].jsd)
        assert [label.get_text() for label in axes.get_xticklabels()] == list(TOKENS)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["4→6", "2→3"]
        labels = [label.get_text() for label in bar.get_yticklabels()]
        assert labels[0] == "0" and labels[-1] == "log 2" and "nats" in axes.get_title(loc="left")
