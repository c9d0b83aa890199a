"""Figures of a comparison: scores, effects, learning curves, cost against quality. See `looks` for colours and style."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pipeline.reporting.aggregate import AVERAGE
from pipeline.reporting.compare import Contrast
from pipeline.reporting.looks import WIDTH, Look, drawing_style, looks
from pipeline.reporting.statistics import PromptScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[int, float]]
"""(step, value), steps ascending."""

_COLUMNS = 3
_ROW_INCHES, _FRAME_INCHES = 0.24, 0.75
_INTERVAL = 1.96
_LOG_FROM = 20
"""Positive values that lie further apart than this get a logarithmic axis."""
_SMOOTHED_SHARE = 0.1
_CURVES = {"train/loss": "training loss (own objective)", "dev/loss": "dev loss", "dev/rouge_l": "dev ROUGE-L"}


@dataclass(frozen=True)
class Cost:
    """What a training run took, and what came of it.

    Attributes:
        seconds: of training.
        score: mean over benchmarks, 0–100.
    """

    seconds: float
    score: float


@dataclass(frozen=True)
class Bar:
    """A mean score with half its 95 % interval over prompts, and the means of single runs."""

    mean: float
    margin: float
    runs: Sequence[float]


def score_figure(scores: Sequence[PromptScores]) -> Figure:
    """The mean over the benchmarks that all methods have, and each one: bars, whiskers of 95 % over prompts, training seeds.

    Whiskers are ± 1.96 standard errors of a mean over prompts, each prompt the mean over its decodings; the mean over
    benchmarks has the root of their summed squares over their number.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not scores:
        raise ValueError("no scores to draw; give at least one method on one benchmark")
    methods = list(dict.fromkeys(own.method for own in scores))
    names = dict.fromkeys(own.benchmark for own in scores)
    common = [name for name in names if len({own.method for own in scores if own.benchmark == name}) == len(methods)]
    panels_of = {**({AVERAGE: common} if common else {}), **{name: [name] for name in names}}
    columns = list(panels_of)
    found = {
        (method, column): mean_bar([own for own in scores if own.method == method and own.benchmark in averaged])
        for method in methods
        for column, averaged in panels_of.items()
    }
    own_looks = looks(methods)
    with drawing_style():
        figure, panels = _panels(columns, len(methods))
        for axes, name in zip(panels, columns, strict=True):
            _method_axis(axes, methods)
            for row, method in enumerate(methods):
                bar = found[method, name]
                if bar is not None:
                    _draw_bar(axes, row, bar, own_looks[method])
            axes.set_title(_title(name), parse_math=False)
            axes.set_xlim(left=0)
        figure.supxlabel("ROUGE-L; whiskers: 95 % over prompts, dots: training seeds", fontsize=9)
    return figure


def effect_figure(contrasts: Sequence[Contrast], baseline: str) -> Figure:
    """The mean over benchmarks and each of them: every method minus the baseline with its 95 % interval.

    A filled marker is a difference that the corrected test separates from zero, a hollow one is not.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not contrasts:
        raise ValueError("no effects to draw; give at least one method beside the baseline")
    methods = list(dict.fromkeys(found.method for found in contrasts))
    columns = sorted(dict.fromkeys(found.benchmark for found in contrasts), key=lambda name: name != AVERAGE)
    own_looks = looks(methods)
    with drawing_style():
        figure, panels = _panels(columns, len(methods), sharex=True)
        for axes, name in zip(panels, columns, strict=True):
            _method_axis(axes, methods)
            axes.axvline(0, color="#444444", linewidth=1)
            for found in contrasts:
                if found.benchmark == name:
                    _draw_effect(axes, methods.index(found.method), found, own_looks[found.method])
            axes.set_title(_title(name), parse_math=False)
        figure.supxlabel(
            f"ROUGE-L, method minus {baseline}, 95 % interval; filled: separated after correction, hollow: not separated",
            fontsize=9, parse_math=False,
        )  # fmt: skip
    return figure


def curve_figure(curves: Mapping[str, Sequence[Mapping[str, Curve]]]) -> Figure:
    """Training loss, dev loss and dev ROUGE-L over steps, one line per method: the mean over its training seeds.

    The training loss is smoothed: each point is the mean of the last tenth of the run.

    Args:
        curves: method → for each training seed "train/loss", "dev/loss", "dev/rouge_l" → curve, where there is one.

    Raises:
        ValueError: there is nothing to draw.
    """
    names = [name for name in _CURVES if any(run.get(name) for runs in curves.values() for run in runs)]
    if not names:
        raise ValueError("no learning curves to draw; give at least one step of one run")
    own_looks = looks(curves)
    with drawing_style():
        figure = Figure(figsize=(WIDTH, max(3.4, 1.2 + 0.17 * len(curves))), layout="constrained")
        handles: dict[str, Any] = {}
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for method, runs in curves.items():
                mean = _mean_curve([_smooth(run[name]) if name == "train/loss" else run[name] for run in runs if run.get(name)])
                if mean:
                    handles[method] = _draw_curve(axes, mean, own_looks[method])
            _curve_axes(axes, [value for line in axes.lines for value in line.get_ydata()])
            axes.set_title(_CURVES[name])
        figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def cost_figure(costs: Mapping[str, Sequence[Cost]], references: Mapping[str, float]) -> Figure:
    """Training seconds against the mean score: a marker per training run, joined by colour.

    Args:
        costs: method → its runs.
        references: model that was not trained here → mean score, drawn as a level.

    Raises:
        ValueError: there is nothing to draw.
    """
    seconds = [run.seconds for runs in costs.values() for run in runs]
    if not seconds:
        raise ValueError("no costs to draw; give at least one training run")
    own_looks = looks(costs)
    with drawing_style():
        figure = Figure(figsize=(WIDTH, max(3.6, 1.0 + 0.17 * (len(costs) + len(references)))), layout="constrained")
        axes = figure.add_subplot()
        for name, score in references.items():
            dashes = ":" if name.startswith("untrained") else "--"
            axes.axhline(score, color="#767676", linestyle=dashes, linewidth=1.2, label=name)
        for method, runs in costs.items():
            look = own_looks[method]
            x, y = [run.seconds for run in runs], [run.score for run in runs]
            axes.plot(x, y, color=look.colour, marker=look.marker, markersize=8, linestyle="none", label=method)
        if min(seconds) > 0 and max(seconds) / min(seconds) > _LOG_FROM:
            axes.set_xscale("log")
        axes.set_xlabel("training, seconds")
        axes.set_ylabel("ROUGE-L, mean over benchmarks")
        axes.margins(0.1)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _panels(columns: Sequence[str], rows: int, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    wide = min(_COLUMNS, len(columns))
    lines = math.ceil(len(columns) / wide)
    figure = Figure(figsize=(WIDTH, lines * (_FRAME_INCHES + _ROW_INCHES * rows) + 0.3), layout="constrained")
    grid = list(figure.subplots(lines, wide, squeeze=False, sharey=True, sharex=sharex).flat)
    for axes in grid[len(columns) :]:
        axes.remove()
    return figure, grid[: len(columns)]


def _method_axis(axes: Axes, methods: Sequence[str]) -> None:
    axes.set_yticks(range(len(methods)), methods, parse_math=False)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)


def mean_bar(chosen: Sequence[PromptScores]) -> Bar | None:
    """The mean over benchmarks of one method; None where there are none."""
    if not chosen:
        return None
    runs: NDArray[np.float64] = np.mean([own.per_prompt.mean(axis=1) for own in chosen], axis=0)
    errors = [_squared_error(own.per_prompt.mean(axis=0)) for own in chosen]
    return Bar(float(runs.mean()), _INTERVAL * math.sqrt(sum(errors)) / len(errors), runs.tolist())


def _squared_error(prompts: NDArray[np.float64]) -> float:
    return float(prompts.var(ddof=1)) / len(prompts) if len(prompts) > 1 else 0.0


def _draw_bar(axes: Axes, row: int, bar: Bar, look: Look) -> None:
    axes.barh(row, bar.mean, height=0.62, color=look.colour, alpha=0.45, linewidth=0)
    axes.errorbar(bar.mean, row, xerr=bar.margin, color=look.colour, linewidth=1.4, capsize=2.5)
    if len(bar.runs) > 1:
        axes.plot(bar.runs, [row] * len(bar.runs), linestyle="none", marker="o", markersize=3, color="#222222")


def _draw_effect(axes: Axes, row: int, found: Contrast, look: Look) -> None:
    effect, separated = found.effect, found.verdict != "not separated"
    # A benchmark with a single prompt has no interval: its effect is a marker alone.
    if math.isfinite(effect.low) and math.isfinite(effect.high):
        axes.plot([effect.low, effect.high], [row, row], color=look.colour, linewidth=1.8, solid_capstyle="butt")
    axes.plot(
        effect.difference, row, marker="o", markersize=6, markeredgecolor=look.colour, markeredgewidth=1.6, linestyle="none",
        markerfacecolor=look.colour if separated else "white",
    )  # fmt: skip


def _draw_curve(axes: Axes, curve: Curve, look: Look) -> Line2D:
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    every = max(1, len(curve) // 8)
    return axes.plot(steps, values, color=look.colour, marker=look.marker, linestyle=look.dashes, markevery=every)[0]


def _curve_axes(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser step")
    if min(values) > 0 and max(values) / min(values) > _LOG_FROM:
        axes.set_yscale("log")


def _smooth(curve: Curve) -> Curve:
    width = max(1, round(_SMOOTHED_SHARE * len(curve)))
    values = [value for _, value in curve]
    return [(step, statistics.fmean(values[max(0, index + 1 - width) : index + 1])) for index, (step, _) in enumerate(curve)]


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over runs of the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    if not tables:
        return []
    shared = [step for step in tables[0] if all(step in own for own in tables)]
    return [(step, statistics.fmean(own[step] for own in tables)) for step in shared]


def _title(name: str) -> str:
    return "mean over benchmarks" if name == AVERAGE else name
