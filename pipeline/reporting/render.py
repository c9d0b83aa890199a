"""The comparison as people read it: Markdown, terminal, CSV and one HTML page."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reporting.aggregate import AVERAGE, Cell, ResultRow
from pipeline.reporting.differences import Difference

CSV_COLUMNS = ("method", "train_seed", "benchmark", "metric", "mean", "std", "n_decoding_seeds")


@dataclass(frozen=True)
class Picture:
    """A figure: what it shows, and its SVG file."""

    title: str
    path: Path

    def uri(self) -> str:
        """The file as a data URI, so that the page needs no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Page:
    """What report.html shows beside the table.

    Attributes:
        name, description: of the experiment.
        notes: sentences on how to read the tables.
        others: metric → its table, beside that of ROUGE-L.
        costs: method → column → value.
        differences: every setting in which two methods differ.
        figures: drawn into the page.
        examples: prompt, references and one generation per method.
        provenance: name → value.
    """

    name: str
    description: str
    notes: Sequence[str]
    others: Mapping[str, Mapping[str, Mapping[str, Cell]]]
    costs: Mapping[str, Mapping[str, str]]
    differences: Sequence[Difference]
    figures: Sequence[Picture]
    examples: Sequence[Mapping[str, Any]]
    provenance: Mapping[str, str]


def write_csv(path: Path, rows: Iterable[ResultRow]) -> None:
    """results.csv, with the stable columns of DESIGN."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        for row in rows:
            std = "" if row.std is None else f"{row.std:.4f}"
            seed = "" if row.train_seed is None else row.train_seed
            writer.writerow([row.method, seed, row.benchmark, row.metric, f"{row.mean:.4f}", std, row.n_decoding_seeds])


def columns(cells: Mapping[str, Mapping[str, Cell]]) -> list[str]:
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


def markdown_table(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """The table in Markdown."""
    names = columns(cells)
    lines = ["| method | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for method, benchmarks in cells.items():
        lines.append(f"| {method} | " + " | ".join(cell_text(benchmarks.get(name)) for name in names) + " |")
    return "\n".join(lines) + "\n"


def terminal_table(cells: Mapping[str, Mapping[str, Cell]], title: str) -> Any:
    """The table for a terminal, a rich renderable."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    grid.add_column("method")
    for name in columns(cells):
        grid.add_column(name, justify="right")
    for method, benchmarks in cells.items():
        grid.add_row(method, *(cell_text(benchmarks.get(name)) for name in columns(cells)))
    return grid


def html_page(cells: Mapping[str, Mapping[str, Cell]], page: Page) -> str:
    """One self-contained page; everything that a model generated is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("pipeline.reporting"), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.j2")
    others = [(metric, *_texts(found)) for metric, found in page.others.items()]
    names, rows = _texts(cells)
    return template.render(page=page, columns=names, rows=rows, others=others)


def _texts(cells: Mapping[str, Mapping[str, Cell]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The columns of a table, and its rows as text."""
    names = columns(cells)
    return names, [(method, [cell_text(benchmarks.get(name)) for name in names]) for method, benchmarks in cells.items()]
