"""The comparison for other programs: results.parquet and table.tex."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from pipeline.reporting.aggregate import AVERAGE, Cell, ResultRow
from pipeline.reporting.compare import Standing
from pipeline.reporting.render import cell_text, columns

_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("train_seed", pa.int64()),
        ("benchmark", pa.string()),
        ("metric", pa.string()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("n_decoding_seeds", pa.int64()),
    ]
)
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$", "λ": r"$\lambda$",
}  # fmt: skip


def write_parquet(path: Path, rows: Iterable[ResultRow]) -> None:
    """results.parquet: the rows and columns of results.csv, unrounded, with null for what does not apply."""
    parquet.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA), path)


def tex_table(cells: Mapping[str, Mapping[str, Cell]], standings: Mapping[str, Standing]) -> str:
    r"""The table in LaTeX (needs booktabs): best bold, what the test does not separate from it underlined.

    Args:
        cells: the table.
        standings: column → its best method and ties; empty marks nothing.
    """
    names = columns(cells)
    head = " & ".join(["method", *("mean" if name == AVERAGE else tex(name) for name in names)])
    lines = [f"\\begin{{tabular}}{{l{'r' * len(names)}}}", r"\toprule", f"{head} \\\\", r"\midrule"]
    for method, benchmarks in cells.items():
        marked = (_marked(tex(cell_text(benchmarks.get(name))), method, standings.get(name)) for name in names)
        lines.append(f"{' & '.join([tex(method), *marked])} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def tex(text: str) -> str:
    """The text with everything that LaTeX would read as a command escaped."""
    return "".join(_TEX.get(sign, sign) for sign in text)


def _marked(text: str, method: str, standing: Standing | None) -> str:
    if standing is None:
        return text
    return rf"\textbf{{{text}}}" if method == standing.best else rf"\underline{{{text}}}" if method in standing.tied else text
