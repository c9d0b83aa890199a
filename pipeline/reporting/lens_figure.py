"""Figures of the logit lens: divergence and confidence over layers, heat maps of divergences and of top tokens.

They are legible at 900 pixels, told apart by more than colour (Okabe and Ito's palette, with markers and dashes), and the
same bytes for the same data.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure

from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
from pipeline.evaluation.lens_view import LensCell, LensTable, aligned_layers, layer_name, visible
from pipeline.models.layers import LayerPair
from pipeline.reporting.looks import FONT, HEAT_COLOURS, TITLE_FONT, WIDTH, drawing_style, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Profiles = Mapping[str, Sequence[LayerProfile]]
"""Subject → its layers; `kd s10` and `kd s20` are training seeds of one method and share a line."""

Colour = Literal["probability", "entropy"]

_DPI = 150
_LEVEL_LABELS = 9
_PAIRS_LABEL = "student layer → teacher layer"
_CELL_INCHES, _MARGIN_INCHES, _ROW_INCHES = 0.44, 1.9, 0.175
_CELL_FONT = 7
_TOKEN_POINTS = 46
_LINE_INCHES, _LEAST_INCHES, _MOST_INCHES, _TOKENS_INCHES, _BAR_INCHES = 0.2, 0.5, 4.0, 1.05, 0.13
_HEAT_TICKS = {0.0: "0", 0.1: "0.1", 0.2: "0.2", 0.3: "0.3", 0.4: "0.4", 0.5: "0.5", math.log(2): "log 2"}
_COLOURS = "Blues"
_SEED = re.compile(r" s\d+$")


def divergence_figure(profiles: Profiles) -> Figure:
    """Jensen-Shannon divergence to the teacher over mapped layers: one line per subject.

    Subjects that differ only in their training seed share a line, their mean, and a band from the least to the greatest.

    Raises:
        ValueError: there is nothing to draw.
    """
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, profiles, lambda layer: layer.jsd)
        axes.set_title("Jensen–Shannon divergence to the teacher, nats (0 = same distribution, log 2 ≈ 0.69 = no common token)")
        axes.set_xlabel(_PAIRS_LABEL)
        axes.set_ylim(bottom=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def confidence_figure(profiles: Profiles) -> Figure:
    """Both sides of the divergence over mapped layers: its halves (top) and the mass on the wrong side (bottom).

    Left over-confidence, right under-confidence; see `LayerProfile` for the definitions.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels: list[tuple[str, Callable[[LayerProfile], float]]] = [
        ("over-confident half of the JSD (c = q/p > 1), nats", lambda layer: layer.jsd_over),
        ("under-confident half of the JSD (c < 1), nats", lambda layer: layer.jsd_under),
        ("student's probability mass where c > 2", lambda layer: layer.over_confident_mass),
        ("teacher's probability mass where c < ½", lambda layer: layer.under_confident_mass),
    ]
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
        grid = figure.subplots(2, 2, sharex=True, sharey="row")
        for axes, (title, measure) in zip(grid.flat, panels, strict=True):
            _draw_lines(axes, profiles, measure)
            axes.set_title(title)
        # Only now: a limit ends the scaling to data, and panels of a row share theirs.
        for axes in grid[:, 0]:
            axes.set_ylim(bottom=0)
        for axes in grid[1]:
            axes.set_xlabel(_PAIRS_LABEL)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


def heat_figure(heats: Mapping[str, LensHeat]) -> Figure:
    """Divergence to the teacher at every mapped layer and response token of one row: a panel per subject, one below another.

    Colours mean the same in every panel and in every figure, 0 to log 2.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not heats:
        raise ValueError("no lens heat maps to draw; give at least one")
    heights = [min(max(_LEAST_INCHES, _LINE_INCHES * len(heat.pairs)), _MOST_INCHES) for heat in heats.values()]
    with drawing_style():
        size = (WIDTH, 0.6 + sum(heights) + _TOKENS_INCHES * len(heights))
        figure = Figure(figsize=size, layout="constrained")
        bar, *panels = figure.subplots(1 + len(heights), 1, height_ratios=[_BAR_INCHES, *heights])
        for axes, (name, heat) in zip(panels, heats.items(), strict=True):
            mesh = draw_heat(axes, heat, _CELL_FONT)
            axes.set_title(_fitting(name, 0.8 * 72 * WIDTH, TITLE_FONT), parse_math=False)
        heat_bar(figure, mesh, bar, "horizontal")
        bar.set_title("Jensen–Shannon divergence to the teacher, nats (0 = same distribution, log 2 ≈ 0.69 = no common token)")
        figure.supylabel(_PAIRS_LABEL, fontsize=TITLE_FONT)
        panels[-1].set_xlabel("response token that is predicted, from left to right")
    return figure


def draw_heat(axes: Axes, heat: LensHeat, size: float) -> Any:
    """Draw one heat map, the final layers on top, texts at most `size` points high.

    Returns:
        The coloured cells, for a colour bar.
    """
    order = sorted(range(len(heat.pairs)), key=heat.pairs.__getitem__)
    columns, lines = range(len(heat.tokens) + 1), range(len(order) + 1)
    mesh = axes.pcolormesh(
        columns, lines, [heat.jsd[index] for index in order], cmap=HEAT_COLOURS, vmin=0, vmax=math.log(2),
        edgecolors="white", linewidth=0.5,
    )  # fmt: skip
    labelled = range(len(order) - 1, -1, -max(1, math.ceil(len(order) / 24)))
    axes.set_yticks(
        [line + 0.5 for line in labelled], [_pair_label(heat.pairs[order[line]], False) for line in labelled], fontsize=size
    )
    axes.set_xticks(
        [column + 0.5 for column in columns[:-1]], [_fitting(token, _TOKEN_POINTS, size) for token in heat.tokens],
        fontsize=size, rotation=90, parse_math=False,
    )  # fmt: skip
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return mesh


def heat_bar(figure: Figure, mesh: Any, axes: Axes, orientation: Literal["horizontal", "vertical"]) -> None:
    """The scale of `draw_heat` in axes of its own."""
    bar = figure.colorbar(mesh, cax=axes, orientation=orientation)
    bar.set_ticks(list(_HEAT_TICKS), labels=list(_HEAT_TICKS.values()), fontsize=_CELL_FONT)
    bar.outline.set_visible(False)


def heat_map(
    teacher: LensTable,
    student: LensTable,
    names: Mapping[str, str],
    colour: Colour = "probability",
) -> Figure:
    """The top token of every layer and position, the teacher's left and the student's right, embeddings at the bottom.

    Both panels have one depth axis, so that a student layer stands beside the teacher layer it is compared with
    (l' = l · L_T / L_S). A student's token is bold where it is the teacher's of that layer too. Up to eight positions fit
    into 900 pixels; each further one widens the figure.

    Args:
        teacher: the teacher's table.
        student: the student's table of the same positions.
        names: the models' names under "teacher" and "student".
        colour: probability of the top token, 0–1, or entropy of the distribution, 0 to log V nats.
    """
    layers, columns = max(teacher.num_layers, student.num_layers), len(teacher.positions)
    cell = max(_CELL_INCHES, (WIDTH - _MARGIN_INCHES) / (2 * columns))
    size = (_MARGIN_INCHES + 2 * columns * cell, 1.4 + _ROW_INCHES * (layers + 1))
    with drawing_style():
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, 2)
        drawn = (("teacher", teacher, None), ("student", student, teacher))
        for axes, (who, table, beside) in zip(panels, drawn, strict=True):
            mesh = _draw_cells(axes, table, beside, layers, 0.95 * 72 * cell, colour)
            axes.set_ylim(*_depth_limits(layers, min(teacher.num_layers, student.num_layers)))
            axes.set_title(_fitting(f"{who}: {names[who]}", 72 * cell * columns, TITLE_FONT), parse_math=False)
        bar = figure.colorbar(mesh, ax=list(panels), fraction=0.03, pad=0.01, aspect=40)
        bar.set_label("probability of the top token" if colour == "probability" else "entropy, nats")
        bar.outline.set_visible(False)
        norm = "final norm applied to every layer" if teacher.final_norm else "no norm before the final layer's"
        figure.supxlabel(
            "a cell: the layer's most probable token after the prompt's token below; bold: also the teacher's at that depth\n"
            f"logit lens, {norm}",
            fontsize=8,
        )
    return figure


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write STEM.png and STEM.svg, without date and version, so that equal figures are equal files.

    Returns:
        Both paths.
    """
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    with drawing_style():
        figure.savefig(png, dpi=_DPI, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


def _draw_lines(axes: Axes, profiles: Profiles, measure: Callable[[LayerProfile], float]) -> None:
    pairs = _pairs(profiles)
    final = {_pair(layer) for layers in profiles.values() for layer in layers if layer.final}
    methods = _by_method(profiles)
    found_looks = looks(methods)
    for name, runs in methods.items():
        look = found_looks[name]
        found = {pair: [measure(layer) for run in runs for layer in run if _pair(layer) == pair] for pair in pairs}
        at = [index for index, pair in enumerate(pairs) if found[pair]]
        values = [found[pairs[index]] for index in at]
        axes.plot(
            at, [statistics.fmean(group) for group in values], color=look.colour, marker=look.marker, linestyle=look.dashes,
            label=name if len(runs) == 1 else f"{name} ({len(runs)} seeds)",
        )  # fmt: skip
        if len(runs) > 1:
            axes.fill_between(at, list(map(min, values)), list(map(max, values)), color=look.colour, alpha=0.12, linewidth=0)
    axes.set_xticks(
        range(len(pairs)),
        [_pair_label(pair, pair in final) for pair in pairs],
        rotation=90 if len(pairs) > _LEVEL_LABELS else 0,
    )


def _by_method(profiles: Profiles) -> dict[str, list[Sequence[LayerProfile]]]:
    grouped: dict[str, list[Sequence[LayerProfile]]] = {}
    for subject, layers in profiles.items():
        grouped.setdefault(_SEED.sub("", subject), []).append(layers)
    return grouped


def _pair(layer: LayerProfile) -> LayerPair:
    return layer.student_layer, layer.teacher_layer


def _pair_label(pair: LayerPair, final: bool) -> str:
    return f"{pair[0]}→{pair[1]}" + ("\nfinal" if final else "")


def _pairs(profiles: Profiles) -> list[LayerPair]:
    pairs = sorted({_pair(layer) for layers in profiles.values() for layer in layers})
    if not pairs:
        raise ValueError("no lens profiles to draw; give at least one layer of one subject")
    return pairs


def _draw_cells(axes: Axes, table: LensTable, beside: LensTable | None, layers: int, points: float, colour: Colour) -> Any:
    """Draw one panel, its texts at most `points` wide; a unit of its depth axis is a layer of the deeper model."""
    height, top = layers / table.num_layers, 1.0 if colour == "probability" else math.log(table.vocab_size)
    edges = [(layer - 0.5) * height for layer in range(table.num_layers + 2)]
    values = [[getattr(cell, colour) for cell in row] for row in table.cells]
    mesh = axes.pcolormesh(
        range(len(table.positions) + 1), edges, values, cmap=_COLOURS, vmin=0, vmax=top, edgecolors="#d9d9d9", linewidth=0.5
    )
    for layer, row in enumerate(table.cells):
        theirs = None if beside is None else _cells_beside(layer, table, beside)
        for column, cell in enumerate(row):
            weight = "bold" if theirs is not None and theirs[column].token_id == cell.token_id else "normal"
            axes.text(
                column + 0.5, layer * height, _fitting(visible(cell.token), points, _CELL_FONT, weight), ha="center",
                va="center_baseline", fontsize=_CELL_FONT, fontweight=weight, color=_ink(getattr(cell, colour) / top),
                parse_math=False,
            )  # fmt: skip
    axes.set_yticks(
        [layer * height for layer in range(table.num_layers + 1)],
        [layer_name(layer, table.num_layers) for layer in range(table.num_layers + 1)],
        fontsize=_CELL_FONT,
    )
    axes.set_xticks(
        [column + 0.5 for column in range(len(table.positions))],
        [_fitting(visible(token), points, _CELL_FONT) for token in table.inputs],
        fontsize=_CELL_FONT,
        parse_math=False,
    )
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return mesh


def _cells_beside(layer: int, table: LensTable, other: LensTable) -> Sequence[LensCell] | None:
    """The other model's cells on this layer's line."""
    line = {own: theirs for theirs, own in aligned_layers(other.num_layers, table.num_layers) if own is not None}[layer]
    return None if line is None else other.cells[line]


def _depth_limits(deeper: int, shallower: int) -> tuple[float, float]:
    margin = 0.5 * deeper / shallower
    return -margin, deeper + margin


def _ink(share: float) -> str:
    """Black or white, whichever stands out more from the colour at that share of the scale (at least 4.5 to 1)."""
    channels = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colormaps[_COLOURS](share)[:3]
    ]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    return "black" if luminance > 0.18 else "white"


def _fitting(text: str, points: float, size: float, weight: str = "normal") -> str:
    """The text cut to a width, with a box for every character that the font lacks: matplotlib would draw one and warn."""
    characters = _font(weight).get_charmap()
    drawable = "".join(sign if ord(sign) in characters else "□" for sign in text)
    if _width(drawable, size, weight) <= points:
        return drawable
    while drawable and _width(drawable + "…", size, weight) > points:
        drawable = drawable[:-1]
    return drawable + "…"


def _width(text: str, size: float, weight: str) -> float:
    """Width in points."""
    font = _font(weight)
    font.set_size(size, 72)
    font.set_text(text, 0)
    return float(font.get_width_height()[0]) / 64


@cache
def _font(weight: str) -> Any:
    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=FONT, weight=weight)))
