"""The comparison as people read it: Markdown, terminal, CSV and one HTML page."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from pipeline.reporting.aggregate import AVERAGE, Cell, ResultRow
from pipeline.reporting.compare import Comparison, Contrast, Standing
from pipeline.reporting.differences import Difference
from pipeline.reporting.paper import Score

CSV_COLUMNS = ("method", "train_seed", "benchmark", "metric", "mean", "std", "n_decoding_seeds")
Cells = Mapping[str, Mapping[str, Cell]]
"""Method → benchmark or AVERAGE → cell."""


@dataclass(frozen=True)
class Picture:
    """A figure: what it shows and how to read it, and its SVG file."""

    title: str
    path: Path
    caption: str = ""

    def uri(self) -> str:
        """The file as a data URI, so that the page needs no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Answer:
    """What a model generated for a prompt.

    Attributes:
        name: the model.
        text: its response.
        score: ROUGE-L of this response.
    """

    name: str
    text: str
    score: float


@dataclass(frozen=True)
class Example:
    """A prompt with what the models made of it.

    Attributes:
        title: rule, benchmark and what the rule measured.
        prompt: its text.
        references: acceptable responses.
        answers: shown side by side.
        others: the remaining models'.
    """

    title: str
    prompt: str
    references: Sequence[str]
    answers: Sequence[Answer]
    others: Sequence[Answer] = ()


@dataclass(frozen=True)
class Page:
    """What report.html shows.

    Attributes:
        name, description: of the experiment.
        headline: what the evidence says, in one sentence.
        warning: what must be known before any number is read; empty if there is nothing.
        standing: which method is highest, and what is not separated from it.
        cells: ROUGE-L.
        notes: sentences on how to read the tables.
        orientation: rows of models that were not trained here.
        standings: column → best method and ties.
        marked: among which methods: "trained" ones, or "tested" ones where some of those are not tested.
        published: (method, benchmark) → the paper's score, where the settings are the paper's.
        comparison: every method against the baseline, None where there is nothing to compare.
        others: metric → its table, beside that of ROUGE-L.
        costs: run → column → value.
        shared_costs: sentences on work that several methods share.
        differences: every setting in which two methods differ.
        figures: section ("scores", "effects", "curves", "cost", "lens") → its figures.
        examples: prompts with generations.
        rule: how they were chosen.
        limits: what the numbers cannot say.
        provenance: group → name → value.
    """

    name: str
    description: str
    headline: str
    cells: Cells
    warning: str = ""
    standing: str = ""
    notes: Sequence[str] = ()
    orientation: Sequence[str] = ()
    standings: Mapping[str, Standing] = field(default_factory=dict)
    marked: str = "trained"
    published: Mapping[tuple[str, str], Score] = field(default_factory=dict)
    comparison: Comparison | None = None
    others: Mapping[str, Cells] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shared_costs: Sequence[str] = ()
    differences: Sequence[Difference] = ()
    figures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    rule: str = ""
    limits: Sequence[str] = ()
    provenance: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _ScoreText:
    """A cell of the page's first table.

    Attributes:
        text: mean, with its deviation over training seeds.
        decoding: deviation over decoding seeds.
        paper: the paper's score and the difference.
        standing: "best", "tied" or nothing.
    """

    text: str
    decoding: str
    paper: str
    standing: str


def write_csv(path: Path, rows: Iterable[ResultRow]) -> None:
    """results.csv, with the stable columns of DESIGN."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        for row in rows:
            std = "" if row.std is None else f"{row.std:.4f}"
            seed = "" if row.train_seed is None else row.train_seed
            writer.writerow([row.method, seed, row.benchmark, row.metric, f"{row.mean:.4f}", std, row.n_decoding_seeds])


def columns(cells: Cells) -> list[str]:
    """Benchmarks of a table in order, the average last."""
    names = [name for benchmarks in cells.values() for name in benchmarks if name != AVERAGE]
    return [*dict.fromkeys(names), AVERAGE]


def cell_text(cell: Cell | None) -> str:
    """`12.34 ± 0.56`: mean and deviation over training seeds; for a single run in brackets, over decoding seeds."""
    if cell is None:
        return "–"
    if cell.train_std is not None:
        return f"{cell.mean:.2f} ± {cell.train_std:.2f}"
    if cell.decoding_std is not None:
        return f"{cell.mean:.2f} (± {cell.decoding_std:.2f})"
    return f"{cell.mean:.2f}"


def markdown_table(cells: Cells, standings: Mapping[str, Standing] | None = None) -> str:
    """The table in Markdown; with standings, the best is bold and what the test does not separate from it underlined."""
    names = columns(cells)
    lines = ["| method | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    marks = {"best": ("**", "**"), "tied": ("<u>", "</u>"), "": ("", "")}
    for method, benchmarks in cells.items():
        texts = []
        for name in names:
            before, after = marks[_standing((standings or {}).get(name), method)]
            texts.append(f"{before}{cell_text(benchmarks.get(name))}{after}")
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def terminal_table(cells: Cells, title: str) -> Any:
    """The table for a terminal, a rich renderable."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    # Names are what a row is known by: scores wrap before they do.
    grid.add_column("method", no_wrap=True, min_width=max(map(len, cells), default=0))
    for name in columns(cells):
        grid.add_column(name, justify="right")
    for method, benchmarks in cells.items():
        grid.add_row(method, *(cell_text(benchmarks.get(name)) for name in columns(cells)))
    return grid


def html_page(page: Page) -> str:
    """One self-contained page; everything that a model generated is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": signed,
        "interval": interval,
        "p": p_text,
        "column": _column,
        "said": said,
        "breakable": _breakable,
    }
    template = environment.get_template("report.html.j2")
    names = columns(page.cells)
    rows = [(method, method in page.orientation, [_score_text(page, method, name) for name in names]) for method in page.cells]
    return template.render(
        page=page,
        columns=names,
        seeds=any(cell.train_std is not None for own in page.cells.values() for cell in own.values()),
        rows=rows,
        others=[(metric, *_texts(found)) for metric, found in page.others.items()],
        effects=_effects(page.comparison),
    )


def signed(value: float) -> str:
    """`+1.20`, `−0.35`: two decimals with a sign, none for zero."""
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    rounded = round(value, 2)
    return f"{rounded:+.2f}".replace("-", "−") if rounded else "0.00"


def interval(found: Contrast) -> str:
    """`−0.10 to +2.50`."""
    return f"{signed(found.effect.low)} to {signed(found.effect.high)}"


def p_text(value: float) -> str:
    """Three decimals, or a bound."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def said(found: Contrast, baseline: str) -> str:
    """The verdict in words; never a winner where nothing is separated."""
    if found.verdict == "not separated":
        return "not separated at this budget"
    return f"{found.verdict} than {baseline}"


def _effects(comparison: Comparison | None) -> tuple[list[str], list[tuple[str, list[Contrast | None]]]]:
    """Benchmarks, and for each method its effect on each."""
    if comparison is None:
        return [], []
    names = list(dict.fromkeys(found.benchmark for found in comparison.benchmarks))
    found = {(one.method, one.benchmark): one for one in comparison.benchmarks}
    methods = dict.fromkeys(one.method for one in comparison.averages)
    return names, [(method, [found.get((method, name)) for name in names]) for method in methods]


def _score_text(page: Page, method: str, column: str) -> _ScoreText:
    cell, paper = page.cells[method].get(column), page.published.get((method, column))
    standing = _standing(page.standings.get(column), method)
    if cell is None:
        return _ScoreText("–", "", "", standing)
    deviation = "" if cell.train_std is None else f" ± {cell.train_std:.2f}"
    decoding = "" if cell.decoding_std is None else f"decoding ± {cell.decoding_std:.2f}"
    compared = "" if paper is None else f"paper {paper.mean:.2f}, ours {signed(cell.mean - paper.mean)}"
    return _ScoreText(f"{cell.mean:.2f}{deviation}", decoding, compared, standing)


def _standing(standing: Standing | None, method: str) -> str:
    if standing is None:
        return ""
    return "best" if method == standing.best else "tied" if method in standing.tied else ""


def standing_text(standing: Standing | None, marked: str = "trained") -> str:
    """One sentence on the average; a method with ties beside it is called the highest, not the best.

    Args:
        standing: of the average.
        marked: what it is among, see `Page`.
    """
    if standing is None:
        return ""
    among, other = ("Of the tested methods ", "other of them") if marked == "tested" else ("", "other method")
    if not standing.tied:
        return f"{among}{standing.best} has the highest mean over benchmarks, separated from every {other}."
    return f"{among}{standing.best} has the highest mean over benchmarks; not separated from it: {', '.join(standing.tied)}."


def _column(name: str) -> str:
    return "mean over benchmarks" if name == AVERAGE else name


def _breakable(name: str) -> Markup:
    """A dotted path that may be broken after its dots and underscores."""
    return escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _texts(cells: Cells) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The columns of a table, and its rows as text."""
    names = columns(cells)
    return names, [(method, [cell_text(benchmarks.get(name)) for name in names]) for method, benchmarks in cells.items()]
