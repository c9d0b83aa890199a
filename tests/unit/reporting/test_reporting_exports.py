"""results.parquet and table.tex."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet

from pipeline.reporting.aggregate import RunScores, result_rows, table
from pipeline.reporting.compare import Standing
from pipeline.reporting.exports import tex, tex_table, write_parquet
from pipeline.reporting.render import CSV_COLUMNS

ROWS = result_rows(
    [RunScores("teacher", None, "s_ni", {"rouge_l": [1 / 3]}), RunScores("kd λ=0.5", 10, "s_ni", {"rouge_l": [20.0, 22.0]})]
)


def test_parquet_has_the_columns_of_the_csv_unrounded(tmp_path: Path) -> None:
    write_parquet(tmp_path / "r.parquet", ROWS)
    found = parquet.read_table(tmp_path / "r.parquet")
    assert tuple(found.column_names) == CSV_COLUMNS
    first = found.to_pylist()[0]
    assert (first["train_seed"], first["mean"], first["std"], first["n_decoding_seeds"]) == (None, 1 / 3, None, 1)
    write_parquet(tmp_path / "empty.parquet", [])
    assert parquet.read_table(tmp_path / "empty.parquet").schema == found.schema


def test_tex_marks_best_and_ties_and_escapes_names() -> None:
    lines = tex_table(table(ROWS), {"s_ni": Standing("kd λ=0.5", ("teacher",))}).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[2] == r"method & s\_ni & mean \\"
    assert lines[4] == r"teacher & \underline{0.33} & 0.33 \\"
    assert lines[5] == r"kd $\lambda$=0.5 & \textbf{21.00 ($\pm$ 1.41)} & 21.00 ($\pm$ 1.41) \\"
    assert lines[-1] == r"\end{tabular}"


def test_no_command_survives() -> None:
    assert tex(r"\input{x} 5% a&b #1 $x$ ~^") == (
        r"\textbackslash{}input\{x\} 5\% a\&b \#1 \$x\$ \textasciitilde{}\textasciicircum{}"
    )
