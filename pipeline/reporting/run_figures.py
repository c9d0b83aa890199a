"""Small square figures of one run for a wall of them: the run in its colour, every other run in grey on the same axes.

They are read beside each other at 256 pixels, which is what the MLflow UI makes of any image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from matplotlib.figure import Figure

from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
from pipeline.reporting.aggregate import AVERAGE
from pipeline.reporting.figures import Bar, Cost, Curve, mean_bar
from pipeline.reporting.lens_figure import draw_heat, heat_bar
from pipeline.reporting.looks import Look, drawing_style
from pipeline.reporting.statistics import PromptScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 3.5
"""Inches."""
BEFORE = "untrained"
"""The run that a layer's divergence is compared with: the student before training."""

_OTHERS = "#c8c8c8"
_BEFORE_LOOK = Look("#767676", "", ":")
_LOG_FROM = 20
_TOKEN_FONT = 6
_CURVES = {"dev/rouge_l": "dev ROUGE-L", "dev/loss": "dev loss", "train/loss": "training loss (own objective)"}
Measure = Callable[[LayerProfile], float]
T = TypeVar("T")


def score_figure(scores: Mapping[str, Sequence[PromptScores]], run: str, look: Look) -> Figure:
    """The mean over the benchmarks that all runs have, and each one: a bar, whiskers of 95 % over prompts.

    Args:
        scores: run → its score on every benchmark.
        run: the one in colour.
        look: its own.
    """
    common = set.intersection(*({one.benchmark for one in own} for own in scores.values()))
    bars = {name: _bars(own, common) for name, own in scores.items()}
    names = list(bars[run])
    with drawing_style():
        figure, (axes,) = _stack(1)
        means, margins = zip(*((bar.mean, bar.margin) for bar in bars[run].values()), strict=True)
        axes.barh(range(len(names)), means, height=0.62, color=look.colour, alpha=0.45, linewidth=0)
        axes.errorbar(means, range(len(names)), xerr=margins, color=look.colour, linestyle="none", linewidth=1.4, capsize=2.5)
        axes.set_yticks(range(len(names)), ["mean" if name == AVERAGE else name for name in names], parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.05 * max((bar.mean + bar.margin for own in bars.values() for bar in own.values()), default=1) or 1)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_title("ROUGE-L, 95 % over prompts")
    return figure


def curve_figure(curves: Mapping[str, Mapping[str, Curve]], run: str, look: Look) -> Figure:
    """Dev ROUGE-L, dev loss and training loss over steps, as far as a run has them.

    Args:
        curves: run → metric → curve.
        run: the one in colour.
        look: its own.
    """
    names = [name for name in _CURVES if any(own.get(name) for own in curves.values())]
    with drawing_style():
        figure, panels = _stack(len(names))
        for axes, name in zip(panels, names, strict=True):
            for other, own in _last(curves, run):
                if own.get(name):
                    steps, measured = zip(*own[name], strict=True)
                    _draw(axes, steps, measured, look if other == run else None)
            values = [value for own in curves.values() for _, value in own.get(name, ())]
            if min(values) > 0 and max(values) / min(values) > _LOG_FROM:
                axes.set_yscale("log")
            axes.set_title(_CURVES[name])
        panels[-1].set_xlabel("optimiser step")
    return figure


def cost_figure(costs: Mapping[str, Cost], run: str, look: Look) -> Figure:
    """Training seconds against the mean score.

    Args:
        costs: run → what it took.
        run: the one in colour.
        look: its own.
    """
    with drawing_style():
        figure, (axes,) = _stack(1)
        for other, cost in _last(costs, run):
            colour, marker = (look.colour, look.marker) if other == run else (_OTHERS, "o")
            axes.plot(cost.seconds, cost.score, color=colour, marker=marker, markersize=9, linestyle="none")
        seconds = [cost.seconds for cost in costs.values()]
        if min(seconds) > 0 and max(seconds) / min(seconds) > _LOG_FROM:
            axes.set_xscale("log")
        axes.margins(0.12)
        axes.set_title("ROUGE-L (mean) against training seconds")
    return figure


def divergence_figure(profiles: Mapping[str, Sequence[LayerProfile]], run: str, look: Look) -> Figure:
    """Jensen-Shannon divergence to the teacher at every mapped layer, before training and after.

    Args:
        profiles: run → its layers, the same pairs in every run.
        run: the one in colour.
        look: its own.
    """
    return _layer_figure(profiles, run, look, {"JSD to the teacher, nats": lambda layer: layer.jsd})


def confidence_figure(profiles: Mapping[str, Sequence[LayerProfile]], run: str, look: Look) -> Figure:
    """The mass on the wrong side at every mapped layer: over-confident above, under-confident below; see `LayerProfile`.

    Args:
        profiles: run → its layers, the same pairs in every run.
        run: the one in colour.
        look: its own.
    """
    panels: dict[str, Measure] = {
        "over-confident: student's mass where q > 2p": lambda layer: layer.over_confident_mass,
        "under-confident: teacher's mass where q < p/2": lambda layer: layer.under_confident_mass,
    }
    return _layer_figure(profiles, run, look, panels)


def heat_figure(heat: LensHeat) -> Figure:
    """Jensen-Shannon divergence to the teacher at every mapped layer and response token of one dev row.

    Args:
        heat: the run's; the row and the pairs are the same in every run, and so is the scale of the colours.
    """
    with drawing_style():
        figure = Figure(figsize=(SIDE, SIDE), layout="constrained")
        axes, bar = figure.subplots(1, 2, width_ratios=[24, 1])
        heat_bar(figure, draw_heat(axes, heat, _TOKEN_FONT), bar, "vertical")
        axes.set_title("JSD to the teacher on a dev row, nats")
        axes.set_ylabel("student layer → teacher layer")
        axes.set_xlabel("response token")
    return figure


def _layer_figure(
    profiles: Mapping[str, Sequence[LayerProfile]], run: str, look: Look, measures: Mapping[str, Measure]
) -> Figure:
    with drawing_style():
        figure, panels = _stack(len(measures))
        for axes, (title, measure) in zip(panels, measures.items(), strict=True):
            for other, layers in _last(profiles, run):
                drawn = look if other == run else _BEFORE_LOOK if other == BEFORE else None
                _draw(axes, range(len(layers)), [measure(layer) for layer in layers], drawn, other)
            axes.set_ylim(bottom=0)
            axes.set_title(title)
        panels[0].legend(fontsize=7)
        pairs = [f"{layer.student_layer}→{layer.teacher_layer}" for layer in profiles[run]]
        panels[-1].set_xticks(range(len(pairs)), pairs, fontsize=7, rotation=90 if len(pairs) > 8 else 0)
        panels[-1].set_xlabel("student layer → teacher layer")
    return figure


def _stack(rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(SIDE, SIDE), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True).flat)


def _last(found: Mapping[str, T], run: str) -> list[tuple[str, T]]:
    """Every run, the one in colour last, so that nothing covers it."""
    return sorted(found.items(), key=lambda item: item[0] == run)


def _draw(axes: Axes, x: Sequence[float], y: Sequence[float], look: Look | None, label: str | None = None) -> None:
    """A line, in grey and without a name where it has no look of its own; a curve of a single point is a marker."""
    if look is None:
        axes.plot(x, y, color=_OTHERS, linewidth=1, marker="." if len(x) == 1 else "")
        return
    axes.plot(
        x, y, color=look.colour, linestyle=look.dashes, linewidth=2, marker=look.marker, markevery=max(1, len(x) // 6),
        label=label,
    )  # fmt: skip


def _bars(scores: Sequence[PromptScores], common: set[str]) -> dict[str, Bar]:
    """First the mean over the benchmarks that all runs have, then every benchmark."""
    found = {AVERAGE: mean_bar([one for one in scores if one.benchmark in common])}
    found |= {one.benchmark: mean_bar([one]) for one in scores}
    return {name: bar for name, bar in found.items() if bar is not None}
