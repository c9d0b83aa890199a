"""Figures of a comparison: what is drawn, and that gaps are no error."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.reporting.aggregate import AVERAGE
from pipeline.reporting.compare import Contrast
from pipeline.reporting.figures import Cost, cost_figure, curve_figure, effect_figure, score_figure
from pipeline.reporting.lens_figure import save
from pipeline.reporting.statistics import Effect, PromptScores, Verdict


def scores(method: str, benchmark: str, values: list[list[float]]) -> PromptScores:
    ids = tuple(map(str, range(len(values[0]))))
    return PromptScores(method, benchmark, tuple(range(len(values))), ids, np.array([[run] for run in values]))


def contrast(benchmark: str, verdict: Verdict, low: float = -1.0, method: str = "sft") -> Contrast:
    return Contrast(method, benchmark, Effect(1.0, low, 3.0, 0.2, 0.9, 5, 1, False), 0.2, verdict)


def test_a_panel_for_the_mean_and_one_per_benchmark() -> None:
    figure = score_figure([scores("kd", "a", [[1.0, 3.0], [3.0, 5.0]]), scores("kd", "b", [[4.0, 4.0], [8.0, 8.0]])])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mean over benchmarks", "a", "b"]
    widths = [axes.patches[0].get_width() for axes in figure.axes]
    assert widths == pytest.approx([4.5, 3, 6])
    dots = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[3.0, 6.0]]


def test_whiskers_are_95_percent_over_prompts() -> None:
    figure = score_figure([scores("kd", "a", [[1.0, 3.0]])])
    (bars,) = figure.axes[1].collections
    (segment,) = bars.get_segments()
    assert segment[:, 0] == pytest.approx([2 - 1.96, 2 + 1.96])  # standard error √2/√2


def test_a_method_without_a_benchmark_has_no_bar_there() -> None:
    figure = score_figure([scores("kd", "a", [[1.0]]), scores("kd", "b", [[9.0]]), scores("sft", "a", [[1.0]])])
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 1]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 1.0]  # averages are over what both have


def test_without_a_common_benchmark_there_is_no_average() -> None:
    figure = score_figure([scores("kd", "a", [[1.0]]), scores("sft", "b", [[1.0]])])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]


def test_a_marker_is_filled_only_where_the_test_separates() -> None:
    figure = effect_figure([contrast("a", "not separated"), contrast(AVERAGE, "better")], "kd")
    markers = [next(line for line in axes.lines if line.get_marker() == "o") for axes in figure.axes]
    assert markers[1].get_markerfacecolor() == "white" and markers[0].get_markerfacecolor() != "white"


def test_an_infinite_interval_is_a_marker_alone() -> None:
    figure = effect_figure([contrast("a", "not separated", low=-math.inf)], "kd")
    assert all(np.isfinite(line.get_xdata()).all() for line in figure.axes[0].lines)
    assert len(figure.axes[0].lines) == 2  # zero line and marker


def test_curves_are_means_over_the_steps_that_all_runs_have() -> None:
    runs = [{"dev/loss": [(1, 2.0), (2, 1.0)]}, {"dev/loss": [(1, 4.0)], "train/loss": []}]
    figure = curve_figure({"kd": runs, "sft": []})
    (line,) = figure.axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [3.0])
    assert len(figure.axes) == 1


def test_the_training_loss_is_a_running_mean_over_a_tenth() -> None:
    curve = [(step, float(step)) for step in range(1, 21)]
    (line,) = curve_figure({"kd": [{"train/loss": curve}]}).axes[0].lines
    assert list(line.get_ydata())[:3] == [1.0, 1.5, 2.5]


def test_losses_far_apart_and_seconds_far_apart_have_logarithmic_axes() -> None:
    far = {"kd": [{"train/loss": [(1, 0.1)]}], "mse": [{"train/loss": [(1, 50.0)]}]}
    assert curve_figure(far).axes[0].get_yscale() == "log"
    assert cost_figure({"kd": [Cost(1, 5.0)], "sft": [Cost(100, 5.0)]}, {}).axes[0].get_xscale() == "log"
    assert cost_figure({"kd": [Cost(0, 5.0)], "sft": [Cost(100, 5.0)]}, {}).axes[0].get_xscale() == "linear"


def test_costs_have_a_marker_per_run_and_a_level_per_model() -> None:
    axes = cost_figure({"kd": [Cost(1, 5.0), Cost(2, 6.0)]}, {"teacher": 9.0}).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[9.0, 9.0], [5.0, 6.0]]


def test_nothing_to_draw_is_an_error() -> None:
    for draw in (
        lambda: score_figure([]),
        lambda: effect_figure([], "kd"),
        lambda: curve_figure({}),
        lambda: cost_figure({}, {}),
    ):
        with pytest.raises(ValueError, match="to draw"):
            draw()


def test_names_are_no_mathematics_and_equal_figures_are_equal_files(tmp_path: Path) -> None:
    def made(name: str) -> bytes:
        figure = score_figure([scores("$x_{", "a$^", [[1.0, 2.0]])])
        return save(figure, tmp_path / name)[1].read_bytes()

    assert made("one") == made("two")
