"""What the lens figures show, that it can be read, and that equal data give equal files."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
from pipeline.evaluation.lens_view import LensCell, LensTable
from pipeline.reporting.lens_figure import confidence_figure, divergence_figure, heat_figure, heat_map, save

METHODS = ("untrained", "sft", "kd", "rkl", "fkl_rkl", "jsd", "akl", "seqkd", "mse", "distilllens")
NAMES = {"teacher": "big", "student": "small"}


def layers(scale: float = 1.0) -> list[LayerProfile]:
    return [
        LayerProfile(
            student_layer=student, teacher_layer=2 * student, final=student == 4, tokens=7,
            jsd=0.30 * scale * student / 4, jsd_over=0.20 * scale * student / 4, jsd_under=0.10 * scale * student / 4,
            teacher_entropy=1.0, student_entropy=2.0,
            over_confident_mass=0.5 * scale * student / 4, under_confident_mass=0.4 * scale * student / 4, top1_agreement=0.5,
        )
        for student in (1, 2, 4)
    ]  # fmt: skip


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): list(map(float, line.get_ydata())) for line in axes.lines}


def rendered(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def test_divergence_before_and_after() -> None:
    figure = divergence_figure({"untrained": layers(), "kd s10": layers(0.5)})
    axes = figure.axes[0]
    assert lines(axes) == {
        "untrained": pytest.approx([0.075, 0.15, 0.3]), "kd": pytest.approx([0.0375, 0.075, 0.15]),
    }  # fmt: skip
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1→2", "2→4", "4→8\nfinal"]
    assert legend(figure) == ["untrained", "kd"] and axes.get_ylim()[0] == 0


def test_training_seeds_share_a_line_and_a_band() -> None:
    figure = divergence_figure({"untrained": layers(), "kd s10": layers(0.5), "kd s20": layers(0.7)})
    axes = figure.axes[0]
    assert lines(axes)["kd (2 seeds)"] == pytest.approx([0.045, 0.09, 0.18])
    bands = [band for band in axes.collections if isinstance(band, PolyCollection)]
    heights = bands[0].get_paths()[0].vertices[:, 1]
    assert len(bands) == 1 and heights.max() == pytest.approx(0.21) and heights.min() == pytest.approx(0.0375)


def test_layers_that_a_subject_lacks_are_left_out_of_its_line() -> None:
    axes = divergence_figure({"kd": layers(), "mse": layers()[1:2]}).axes[0]
    assert list(axes.lines[1].get_xdata()) == [1] and lines(axes)["mse"] == pytest.approx([0.15])


def test_both_sides_of_the_divergence() -> None:
    figure = confidence_figure({"untrained": layers(), "kd": layers(0.5)})
    shown = [lines(axes)["untrained"][-1] for axes in figure.axes]
    assert shown == pytest.approx([0.2, 0.1, 0.5, 0.4])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [word in title for word, title in zip(("over", "under", "c > 2", "c < ½"), titles, strict=True)] == [True] * 4
    # Panels of a row can be compared, and nothing is cut off.
    for left, right in (figure.axes[:2], figure.axes[2:]):
        assert left.get_ylim() == right.get_ylim()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low == 0 and high > max(max(values) for values in lines(axes).values())


def test_a_high_right_panel_is_not_cut_off() -> None:
    tall = [replace(layer, jsd_under=0.34, under_confident_mass=0.99) for layer in layers()]
    figure = confidence_figure({"kd": tall})
    assert figure.axes[0].get_ylim()[1] > 0.34 and figure.axes[2].get_ylim()[1] > 0.99


def test_methods_are_told_apart_without_colour_and_keep_their_look() -> None:
    axes = divergence_figure({name: layers() for name in METHODS}).axes[0]
    looks = {str(line.get_label()): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len({marker for _, marker, _ in looks.values()}) == len({(c, d) for c, _, d in looks.values()}) == len(METHODS)
    alone = divergence_figure({"kd": layers()}).axes[0].lines[0]
    assert looks["kd"] == (alone.get_color(), alone.get_marker(), alone.get_linestyle())


def test_any_number_of_other_subjects_can_be_drawn() -> None:
    axes = divergence_figure({f"ablation {name}": layers() for name in "abcdefghijklmnop"}).axes[0]
    assert len(axes.lines) == 16 and len({(li.get_color(), li.get_marker(), li.get_linestyle()) for li in axes.lines}) == 12


def test_nothing_to_draw() -> None:
    for draw in (divergence_figure, confidence_figure):
        with pytest.raises(ValueError, match="no lens profiles to draw"):
            draw({"untrained": []})


def no_overlap(figure: Figure) -> None:
    """No two tick labels, and no legend and axis label, lie over each other."""
    renderer = rendered(figure).canvas.get_renderer()  # type: ignore[attr-defined]
    below = [axes.xaxis.label for axes in figure.axes if axes.get_xlabel()]
    for axes in figure.axes:
        ticks = [tick.get_window_extent(renderer) for tick in axes.get_xticklabels() if tick.get_text()]
        assert not any(one.overlaps(other) for one, other in zip(ticks, ticks[1:], strict=False))
    box = figure.legends[0].get_window_extent(renderer)
    assert below and not any(box.overlaps(label.get_window_extent(renderer)) for label in below)
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0


@pytest.mark.parametrize("draw", [divergence_figure, confidence_figure])
@pytest.mark.parametrize("pairs", [3, 31])
def test_labels_do_not_overlap(draw: object, pairs: int) -> None:
    base = layers()[0]
    many = [replace(base, student_layer=layer, teacher_layer=layer + 10) for layer in range(pairs)]
    no_overlap(draw({f"{name} s{seed}": many for name in METHODS for seed in (1, 2)}))  # type: ignore[operator]


def table(tokens: list[list[str]], probability: float = 0.25) -> LensTable:
    """Token ids follow the text, so that equal texts are equal tokens."""

    def cell(column: int, text: str) -> LensCell:
        return LensCell(zlib.crc32(text.encode()), text, probability + 0.1 * column, 2.0 - column)

    cells = tuple(tuple(cell(column, text) for column, text in enumerate(row)) for row in tokens)
    return LensTable((3, 4), (" is", "\n"), cells, 100, False)


TEACHER = table([["a0", "b0"], ["a1", "b1"], ["a2", "b2"], ["a3", "b3"], ["a4", "b4"]])
STUDENT = table([["a0", "x"], ["a2", "y"], ["z", "b4"]], 0.7)


def cell_texts(axes: Axes) -> dict[tuple[float, float], Text]:
    return {text.get_position(): text for text in axes.texts}


def test_the_heat_map_puts_student_layers_at_their_teachers_depth() -> None:
    left, right, _ = heat_map(TEACHER, STUDENT, NAMES).axes
    assert {at: text.get_text() for at, text in cell_texts(right).items()} == {
        (0.5, 0): "a0", (1.5, 0): "x", (0.5, 2): "a2", (1.5, 2): "y", (0.5, 4): "z", (1.5, 4): "b4",
    }  # fmt: skip
    assert cell_texts(left)[0.5, 3].get_text() == "a3"
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] < 0 < left.get_ylim()[1]
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["embed", "1", "final"]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["␣is", "↵"]
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("teacher: big", "student: small")


def test_a_student_deeper_than_its_teacher() -> None:
    left, right, _ = heat_map(STUDENT, TEACHER, NAMES).axes
    assert cell_texts(left)[0.5, 2].get_text() == "a2" and cell_texts(right)[0.5, 3].get_text() == "a3"
    assert cell_texts(right)[0.5, 2].get_fontweight() == "bold" and cell_texts(right)[0.5, 3].get_fontweight() == "normal"


def test_agreement_with_the_teacher_is_bold() -> None:
    left, right, _ = heat_map(TEACHER, STUDENT, NAMES).axes
    assert {text.get_text() for text in right.texts if text.get_fontweight() == "bold"} == {"a0", "a2", "b4"}
    assert all(text.get_fontweight() == "normal" for text in left.texts)


def test_colour_is_the_measure_asked_for() -> None:
    def shown(colour: str) -> QuadMesh:
        return heat_map(TEACHER, STUDENT, NAMES, colour).axes[1].collections[0]  # type: ignore[arg-type, return-value]

    np.testing.assert_allclose(shown("probability").get_array().reshape(3, 2), [[0.7, 0.8]] * 3)
    np.testing.assert_allclose(shown("entropy").get_array().reshape(3, 2), [[2.0, 1.0]] * 3)
    assert shown("probability").get_clim() == (0, 1) and shown("entropy").get_clim() == pytest.approx((0, np.log(100)))


def luminance(colour: object) -> float:
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("probability", np.linspace(0, 0.9, 19))
def test_text_stands_out_from_every_colour(probability: float) -> None:
    axes = rendered(heat_map(TEACHER, table([["a", "b"], ["c", "d"]], probability), NAMES)).axes[1]
    for text, colour in zip(axes.texts, axes.collections[0].get_facecolors(), strict=True):
        light, dark = sorted((luminance(text.get_color()), luminance(colour)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5


LONG = ["W" * 30, " internationalisation", "iiiiiiiii", "$x^2$", "\x1b[31m", "<|im_start|>", " the", "phthalm"]


def wide(count: int) -> LensTable:
    cells = tuple(tuple(LensCell(index, LONG[index % 8], 1.0, 0.0) for index in range(count)) for _ in range(9))
    return LensTable(tuple(range(count)), tuple(LONG[index % 8] for index in range(count)), cells, 100, True)


@pytest.mark.parametrize("count", [1, 8, 12])
def test_text_stays_in_its_cell_and_is_legible_at_900_pixels(count: int) -> None:
    names = {"teacher": "t" * 300, "student": "s" * 300}
    figure = rendered(heat_map(wide(count), wide(count), names))
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes[:2]:
        cell = axes.get_window_extent(renderer).width / count
        for text in (*axes.texts, *axes.get_xticklabels()):
            assert text.get_window_extent(renderer).width < cell
        assert axes.texts[0].get_fontsize() * 100 / 72 > 9  # pixels at 900 for 9 inches
    titles = [axes.title if axes.get_title() else axes._left_title for axes in figure.axes[:2]]
    assert titles[0].get_window_extent(renderer).x1 < titles[1].get_window_extent(renderer).x0
    assert figure.get_figwidth() <= 9.05 or count > 8


def test_formulas_and_missing_letters_are_only_text() -> None:
    strange = table([["$\\frac$", "猫a"], ["$", "\U00020000"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = rendered(heat_map(strange, strange, {"teacher": "$x$ 猫", "student": "$"}))
    assert [text.get_text() for text in figure.axes[0].texts] == ["$\\frac$", "□a", "$", "□"]
    assert figure.axes[0].get_title(loc="left") == "teacher: $x$ □"


def heat(share: float = 1.0, tokens: int = 3, pairs: int = 2) -> LensHeat:
    values = np.linspace(0, share * np.log(2), tokens * pairs).reshape(pairs, tokens)
    texts = tuple(LONG[index % 8] for index in range(tokens))
    return LensHeat(texts, tuple((2 * at, 3 * at) for at in range(pairs)), tuple(map(tuple, values.tolist())))


def test_a_panel_for_each_subject_in_one_scale_of_colours() -> None:
    figure = heat_figure({"untrained": heat(), "kd s10": heat(0.5), "other teacher": heat(0.1, 5, 4)})
    bar, *panels = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["untrained", "kd s10", "other teacher"]
    assert len({axes.get_position().x0 for axes in panels}) == 1  # one below another
    for axes, own in zip(panels, (heat(), heat(0.5), heat(0.1, 5, 4)), strict=True):
        mesh = axes.collections[0]
        assert mesh.get_clim() == pytest.approx((0, np.log(2))) and mesh.get_cmap() == panels[0].collections[0].get_cmap()
        np.testing.assert_allclose(mesh.get_array().reshape(len(own.pairs), -1), own.jsd)
    assert [tick.get_text() for tick in bar.get_xticklabels()][::6] == ["0", "log 2"]
    assert "nats" in bar.get_title(loc="left")


def test_the_prediction_is_on_top_in_whatever_order_the_pairs_are() -> None:
    own = LensHeat(("a",), ((3, 6), (0, 0), (1, 4)), ((0.6,), (0.1,), (0.2,)))
    axes = heat_figure({"kd": own}).axes[1]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [0.1, 0.2, 0.6])
    assert {tick.get_text(): line for tick, line in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)} == {
        "0→0": 0.5, "1→4": 1.5, "3→6": 2.5,
    }  # fmt: skip
    assert axes.get_ylim()[0] < axes.get_ylim()[1]


def test_equal_steps_of_the_scale_look_equal() -> None:
    """Lightness falls evenly from the teacher's own distribution to one without a common token."""
    mesh = heat_figure({"kd": heat()}).axes[1].collections[0]
    colours = [luminance(mesh.to_rgba(value)) for value in np.linspace(0, np.log(2), 9)]
    steps = -np.diff([116 * value ** (1 / 3) - 16 for value in colours])
    assert steps.min() > 0 and steps.max() < 1.5 * steps.min()


@pytest.mark.parametrize(("tokens", "pairs"), [(1, 1), (24, 3), (24, 100)])
def test_labels_of_heat_maps_keep_apart(tokens: int, pairs: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = rendered(heat_figure({"a": heat(1, tokens, pairs), "$b 猫": heat(0.5, tokens, pairs)}))
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert not any(above.y0 < below.y1 for above, below in zip(boxes, boxes[1:], strict=False))
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1
    for axes in figure.axes[1:]:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            shown = [tick.get_window_extent(renderer) for tick in ticks]
            assert not any(one.overlaps(other) for one, other in zip(shown, shown[1:], strict=False))
    assert figure.axes[2].get_title(loc="left") == "$b □"


def test_no_heat_maps_to_draw() -> None:
    with pytest.raises(ValueError, match="no lens heat maps to draw"):
        heat_figure({})


def figures() -> dict[str, Figure]:
    profiles = {"untrained": layers(), "kd s1": layers(0.5), "kd s2": layers(0.6)}
    return {
        "divergence": divergence_figure(profiles),
        "confidence": confidence_figure(profiles),
        "heat": heat_figure({"untrained": heat(), "kd s1": heat(0.5)}),
        "heat_map": heat_map(TEACHER, STUDENT, NAMES),
    }


@pytest.mark.parametrize("name", ["divergence", "confidence", "heat", "heat_map"])
def test_equal_data_give_equal_files(name: str, tmp_path: Path) -> None:
    first = save(figures()[name], tmp_path / "a.b")
    assert [path.name for path in first] == ["a.b.png", "a.b.svg"]
    # Whatever a user's own matplotlib settings are.
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.hashsalt": "other", "savefig.dpi": 30}):
        second = save(figures()[name], tmp_path / "c")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"Matplotlib" not in first[0].read_bytes() and b"<dc:date>" not in first[1].read_bytes()
    assert first[0].read_bytes()[:4] == b"\x89PNG" and b"<svg" in first[1].read_bytes()


def test_drawing_leaves_the_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    figures()
    assert dict(matplotlib.rcParams) == before
