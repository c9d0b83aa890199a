"""Every rule by which records of several experiments become one report."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
from records import SCORES, changed, protocol, records

from pipeline.errors import ArtifactError, ConfigError
from pipeline.reporting import report
from pipeline.reporting.aggregate import AVERAGE, result_rows, table
from pipeline.reporting.evidence import evidence
from pipeline.reporting.merge import merge
from pipeline.reporting.notes import limits, mixing_warning, reading_notes
from pipeline.reporting.paper import Score
from pipeline.reporting.record import Records, run_scores
from pipeline.reporting.report import write_report

BASE = {"teacher": [None], "kd": [10], "rkl": [10]}
GREEDY = protocol("general", do_sample=False)


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda *arguments: {})  # they take a second each, and say nothing that is asked here


def rows(found: Records) -> dict[str, list[int | None]]:
    return {row: [trial.seed for trial in trials] for row, trials in found.facts.rows.items()}


def said(found: Records) -> str:
    return "\n".join(limits(found.facts, evidence(found)))


def page(found: Records, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    write_report(folder, found, "merged", "0" * 16, {"report written on": "here"})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_identical_trials_are_one_row_of_both_origins() -> None:
    found = merge([records("a", BASE), records("b", {"teacher": [None], "kd": [10], "sft": [10]})])
    assert rows(found) == {"teacher": [None], "kd": [10], "rkl": [10], "sft": [10]}
    facts = found.facts
    assert {trial.row: facts.labels(trial.origins) for trial in facts.trials} == {
        "teacher": "a, b", "kd": "a, b", "rkl": "a", "sft": "b",
    }  # fmt: skip
    assert any("shown once: teacher, kd (a, b)." in note for note in reading_notes(facts))


def test_other_seeds_of_equal_settings_are_pooled() -> None:
    found = merge([records("a", {"kd": [10, 20]}), records("b", {"kd": [30, 20]})])
    assert rows(found) == {"kd": [10, 20, 30]}
    assert any(
        "kd has training seeds of several experiments" in note and "30 (b)" in note for note in reading_notes(found.facts)
    )
    assert table(result_rows(run_scores(found.facts)))["kd"][AVERAGE].n_train_seeds == 3


@pytest.mark.parametrize("change", [{"lr": 2}, {"data": "other"}, {"teacher": "u"}])
def test_seeds_of_other_settings_or_inputs_are_kept_apart(change: dict[str, object]) -> None:
    found = merge([records("a", {"kd": [10]}), records("b", {"kd": [20]}, **change)])
    assert rows(found) == {"kd (a)": [10], "kd (b)": [20]}


def test_seeds_that_were_evaluated_otherwise_are_kept_apart() -> None:
    found = merge([records("a", {"kd": [10]}), records("b", {"kd": [20]}, {"general": None, "tasks": None})])
    assert rows(found) == {"kd (a)": [10], "kd (b)": [20]}


def test_a_checkpoint_has_the_benchmarks_of_both() -> None:
    found = merge([records("a", {"kd": [10]}), records("b", {"kd": [10]}, {"tasks": None})])
    assert rows(found) == {"kd": [10]}
    assert list(found.facts.trials[0].by_benchmark) == ["general", "tasks"] == found.facts.common


def test_rows_of_one_experiment_stay_apart_even_if_they_are_the_same() -> None:
    own = records("a", {"kd": [10]})
    twin = replace(own.facts.trials[0], method="twin", row="twin")
    found = merge([changed(own, trials=[*own.facts.trials, twin]), records("b", {"kd": [10]})])
    assert rows(found) == {"kd": [10], "twin": [10]}
    assert [found.facts.labels(trial.origins) for trial in found.facts.trials] == ["a, b", "a"]


def test_experiments_of_one_name_are_numbered() -> None:
    found = merge([records("a", {"kd": [10]}), records("a", {"kd": [10]}, lr=2)])
    assert list(rows(found)) == ["kd (a 1)", "kd (a 2)"]


def test_the_same_comparison_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="all arguments are the comparison"):
        merge([records("a", BASE), records("a", BASE)])


def test_what_was_merged_can_be_merged_again() -> None:
    first, second, third = records("a", {"kd": [10]}), records("b", {"kd": [10]}, lr=2), records("c", {"kd": [10]}, lr=3)
    assert list(rows(merge([merge([first, second]), third]))) == ["kd (a)", "kd (b)", "kd (c)"]
    again = merge([merge([first, second]), second])
    assert rows(again) == {"kd (a)": [10], "kd (b)": [10]} and len(again.facts.experiments) == 2


def test_models_that_were_not_trained_come_first() -> None:
    found = merge([records("a", BASE), records("b", {"untrained": [None], "kd": [10]})])
    assert list(rows(found)) == ["teacher", "untrained", "kd", "rkl"] and found.facts.baseline == "kd"


def test_several_protocols_are_refused_with_what_differs() -> None:
    own, other = records("a", BASE), records("b", BASE, {"general": GREEDY})
    hashes = [found.facts.trials[0].evaluations[0].protocol_hash for found in (own, other)]
    with pytest.raises(ArtifactError) as error:
        merge([own, other])
    text = str(error.value)
    assert f"general: {hashes[0]} (a) and {hashes[1]} (b)" in text and "--mix-protocols" in text
    assert "differ in decoding.do_sample: true / false" in text and "temperature" not in text


def test_mixed_protocols_are_told_and_not_tested_across(tmp_path: Path) -> None:
    better = {"rkl": tuple(score + 30 for score in SCORES)}
    found = merge([records("a", BASE), records("b", BASE, {"general": GREEDY}, scores=better)], mix_protocols=True)
    result, warning = evidence(found), mixing_warning(found.facts)
    assert result.comparison is not None and [one.method for one in result.comparison.averages] == ["rkl (a)"]
    assert result.left_out == {"kd (b)": "another protocol on general", "rkl (b)": "another protocol on general"}
    assert all(not name.endswith("(b)") for own in result.standings.values() for name in (own.best, *own.tied))
    assert "Protocols are mixed: general by" in warning and warning in said(found)
    text = page(found, tmp_path)
    assert f'<p role="note"><strong>{warning}</strong></p>' in text and "among the tested methods" in text
    assert "Every tested method against kd (a)" in text and "separated from every other method" not in text
    assert warning in (tmp_path / "table.md").read_text() and f"% {warning}" in (tmp_path / "table.tex").read_text()


def test_a_sweep_over_protocols_is_not_mixed() -> None:
    own = records("a", {"kd": [10]})
    other = records("a", {"rkl": [10]}, {"general": GREEDY})
    trials = [*own.facts.trials, *(replace(trial, origins=own.facts.trials[0].origins) for trial in other.facts.trials)]
    found = merge([changed(own, trials=trials)])
    assert mixing_warning(found.facts) == "" and found.facts.mixed == []


def test_other_prompts_are_left_out_of_the_tests() -> None:
    fewer = records("b", {"sft": [10]}, scores={"sft": SCORES[:3]})
    found = evidence(merge([records("a", BASE), fewer]))
    assert found.comparison is not None and [one.method for one in found.comparison.averages] == ["rkl"]
    assert found.left_out == {"sft": "other prompts on general"}


def test_nothing_that_can_be_tested_is_told() -> None:
    found = evidence(merge([records("a", {"kd": [10]}), records("b", {"sft": [10]}, scores={"sft": SCORES[:3]})]))
    assert found.headline == "No other row was evaluated as kd was, so none is tested against it." and not found.standings


def test_the_average_is_over_common_benchmarks(tmp_path: Path) -> None:
    own = records("a", {"kd": [10]}, {"general": None, "tasks": None}, scores={"kd": (0.0, 0.0, 0.0, 40.0)})
    found = merge([own, records("b", {"sft": [10]})])
    cells = table(result_rows(run_scores(found.facts)))
    assert set(cells["kd"]) == {"general", "tasks", AVERAGE} and set(cells["sft"]) == {"general", AVERAGE}
    assert any(
        "avg is the mean over the benchmarks that every row has, general." in note for note in reading_notes(found.facts)
    )
    assert "Only kd was evaluated on tasks; it is no part of the average, and not tested." in said(found)
    comparison = evidence(found).comparison
    assert comparison is not None and {one.benchmark for one in comparison.benchmarks} == {"general"}
    text = page(found, tmp_path)
    assert re.search(r'<th scope="row">sft</th>.*<td>–</td>', text)


def test_no_common_benchmark_has_no_average_and_no_test(tmp_path: Path) -> None:
    found = merge([records("a", {"kd": [10]}), records("b", {"sft": [10]}, {"tasks": None})])
    assert AVERAGE not in {row.benchmark for row in result_rows(run_scores(found.facts))}
    assert evidence(found).headline == "No benchmark is common to all rows: nothing is averaged and nothing is tested."
    assert "No benchmark is common" in page(found, tmp_path)


def test_inputs_that_differ_are_listed(tmp_path: Path) -> None:
    found = merge([records("a", {"kd": [10]}), records("b", {"kd": [10]}, teacher="u", lr=1)])
    page(found, tmp_path)
    listed = {row["setting"]: row for row in csv.DictReader((tmp_path / "differences.csv").open())}
    assert set(listed) == {"lr", "teacher"}
    assert listed["teacher"] == {"setting": "teacher", "kd (a)": "t name (t)", "kd (b)": "u name (u)"}


def test_budgets_are_called_equal_only_if_they_are() -> None:
    def note(*sources: Records) -> str:
        return next(text for text in reading_notes(merge(sources).facts) if "budget" in text or "Every trained row" in text)

    own = records("a", {"kd": [10]})
    assert note(own, records("b", {"sft": [10]})) == "Every trained row had 3 steps and the same data order."
    assert "training data that differ" in note(own, records("b", {"sft": [10]}, data="other"))
    assert "budget of their experiment: 3 steps (a); 9 steps (b)" in note(own, records("b", {"sft": [10]}, budget="9 steps"))
    other = records("b", {"sft": [10]})
    unfair = changed(other, experiments=[replace(other.facts.experiments[0], fair=False)])
    assert "budgets of their own (fair: false)" in note(own, unfair)


def test_metrics_that_are_measured_otherwise_get_names_of_their_own() -> None:
    own, alike = records("a", {"kd": [10]}, metrics={"judge": "m1"}), records("b", {"sft": [10]}, metrics={"judge": "m1"})
    assert {row.metric for row in result_rows(run_scores(merge([own, alike]).facts))} == {"rouge_l", "judge"}
    found = merge([own, records("b", {"kd": [10]}, metrics={"judge": "m2"})])
    assert {row.metric for row in result_rows(run_scores(found.facts))} == {"rouge_l", "judge (a)", "judge (b)"}
    assert {"judge (a): measured by m1.", "judge (b): measured by m2."} <= set(reading_notes(found.facts))


def test_the_papers_scores_stand_where_every_experiment_may_be_compared_with_them(tmp_path: Path) -> None:
    def with_paper(own: Records) -> Records:
        score = Score("S", "T", "kd", "general", 25.0, 0.1, "Table 1")
        return changed(own, experiments=[replace(own.facts.experiments[0], published=[score])])

    own = with_paper(records("a", {"kd": [10]}))
    assert "paper 25.00" in page(merge([own, with_paper(records("b", {"kd": [20]}))]), tmp_path)
    assert "paper 25.00" not in page(merge([own, records("b", {"kd": [20]})]), tmp_path)
    apart = page(merge([own, records("b", {"kd": [20]}, lr=2)]), tmp_path)
    assert apart.count("paper 25.00") == 1


def test_provenance_names_every_experiment_and_who_wrote_the_report(tmp_path: Path) -> None:
    found = merge([records("a", {"kd": [10]}), records("b", {"kd": [10]}, data="other")])
    text = page(found, tmp_path)
    for words in (
        "report written on</dt><dd>here",
        "git commit of a",
        "git commit of b",
        "train kd s10 (a)",
        "train kd s10 (b)",
    ):
        assert words in text
    assert "<dt>training data</dt><dd>data, other</dd>" in text
    assert "Truncated references (a): 1 of 20" in text and "Truncated references (b): 1 of 20" in text


def test_the_baseline_is_the_first_sources_or_the_one_asked_for() -> None:
    own, other = records("a", {"sft": [10], "kd": [10]}), records("b", {"kd": [10]}, lr=2)
    assert merge([own, other]).facts.baseline == "sft"
    assert merge([own, other], "kd (b)").facts.baseline == "kd (b)" and merge([own, other], "sft").facts.baseline == "sft"
    with pytest.raises(ConfigError, match=r"'kd' is several rows; choose one of kd \(a\), kd \(b\)"):
        merge([own, other], "kd")
    with pytest.raises(ConfigError, match=r"'mse' is no row; choose one of sft, kd \(a\), kd \(b\)"):
        merge([own, other], "mse")


def test_one_experiment_alone_keeps_its_report(tmp_path: Path) -> None:
    own = records("a", BASE)
    assert page(merge([own]), tmp_path / "1") == page(own, tmp_path / "2")
