"""Means and deviations: decoding seeds within a run, training seeds across runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pipeline.reporting.aggregate import AVERAGE, RunScores, result_rows, table
from pipeline.reporting.render import CSV_COLUMNS, cell_text, markdown_table, write_csv


def run(method: str, seed: int | None, benchmark: str, rouge: list[float]) -> RunScores:
    return RunScores(method, seed, benchmark, {"rouge_l": rouge, "exact_match": [0.0] * len(rouge)})


SCORES = [
    run("teacher", None, "a", [30.0, 32.0]), run("teacher", None, "b", [10.0, 14.0]),
    run("kd", 1, "a", [20.0, 22.0]), run("kd", 1, "b", [8.0, 6.0]),
    run("kd", 2, "a", [24.0, 26.0]), run("kd", 2, "b", [9.0, 11.0]),
]  # fmt: skip


def test_rows_hold_the_deviation_over_decoding_seeds() -> None:
    rows = {(r.method, r.train_seed, r.benchmark): r for r in result_rows(SCORES) if r.metric == "rouge_l"}
    assert rows["kd", 1, "a"].mean == 21 and rows["kd", 1, "a"].std == pytest.approx(2**0.5)
    assert rows["kd", 1, "a"].n_decoding_seeds == 2


def test_the_average_is_taken_per_decoding_seed_first() -> None:
    rows = {(r.method, r.train_seed, r.benchmark): r for r in result_rows(SCORES) if r.metric == "rouge_l"}
    assert rows["kd", 1, "avg"].mean == 14 and rows["kd", 1, "avg"].std == 0  # (20+8)/2 and (22+6)/2


def test_benchmarks_with_other_numbers_of_decoding_seeds_are_averaged_by_their_means() -> None:
    rows = result_rows([run("kd", 1, "a", [20.0, 22.0]), run("kd", 1, "b", [9.0])])
    average = next(row for row in rows if (row.benchmark, row.metric) == ("avg", "rouge_l"))
    assert (average.mean, average.std, average.n_decoding_seeds) == (15, None, 1)


def test_a_metric_of_some_benchmarks_has_no_average() -> None:
    some = RunScores("kd", 1, "a", {"rouge_l": [1.0], "similarity": [40.0]})
    rows = result_rows([some, RunScores("kd", 1, "b", {"rouge_l": [3.0]})])
    assert {(row.benchmark, row.metric) for row in rows} == {
        ("a", "rouge_l"), ("a", "similarity"), ("b", "rouge_l"), ("avg", "rouge_l"),
    }  # fmt: skip


def test_cells_separate_training_and_decoding_variance() -> None:
    cells = table(result_rows(SCORES))
    assert list(cells) == ["teacher", "kd"]
    kd = cells["kd"]["a"]
    assert (kd.mean, kd.n_train_seeds) == (23, 2)
    assert kd.train_std == pytest.approx(8**0.5) and kd.decoding_std == pytest.approx(2**0.5)
    assert cells["teacher"]["a"].train_std is None
    assert cell_text(kd) == "23.00 ± 2.83" and cell_text(cells["teacher"]["a"]) == "31.00 (± 1.41)"
    assert cell_text(table(result_rows([run("m", 1, "a", [5.0])]))["m"]["a"]) == "5.00"


def test_the_csv_has_the_stable_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "r.csv", result_rows(SCORES))
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert {
        "method": "teacher",
        "train_seed": "",
        "benchmark": "a",
        "metric": "rouge_l",
        "mean": "31.0000",
        "std": "1.4142",
        "n_decoding_seeds": "2",
    } in rows


def test_the_markdown_table_ends_with_the_average() -> None:
    assert markdown_table(table(result_rows(SCORES))).splitlines()[0] == "| method | a | b | avg |"


def test_averages_are_over_the_benchmarks_that_all_have() -> None:
    cells = table(result_rows([run("m", 1, "a", [10.0]), run("m", 1, "b", [90.0]), run("n", 1, "a", [20.0])]))
    assert (cells["m"][AVERAGE].mean, cells["n"][AVERAGE].mean) == (10.0, 20.0)
    apart = table(result_rows([run("m", 1, "a", [10.0]), run("n", 1, "b", [20.0])]))
    assert AVERAGE not in apart["m"] and AVERAGE not in apart["n"]
