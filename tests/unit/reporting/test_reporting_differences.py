"""Every setting in which two methods differ, and no other."""

from __future__ import annotations

import csv
from pathlib import Path

import stages

from pipeline.reporting.differences import differences, write_csv

METHODS = {
    "sft": None,
    "kd": None,
    "seqkd": None,
    "mse": {"features": {"pairs": {"kind": "uniform", "count": 2}}},
    "distilllens": {"lens": {"pairs": {"kind": "uniform", "count": 2}}},
}


def test_equal_settings_are_left_out_and_missing_ones_are_not() -> None:
    rows = differences({"a": {"x": 1, "y": 0.5, "z": None}, "b": {"x": 1, "y": 1.0, "w": True}, "c": {"x": 1, "y": 0.5}})
    assert {row.setting: dict(row.values) for row in rows} == {
        "y": {"a": "0.5", "b": "1", "c": "0.5"},
        "z": {"a": "null", "b": "–", "c": "–"},
        "w": {"a": "–", "b": "true", "c": "–"},
    }
    assert differences({"a": {"x": 1}}) == [] and differences({}) == []


def test_the_csv_has_a_column_for_each_method(tmp_path: Path) -> None:
    write_csv(tmp_path / "d.csv", differences({"a": {"x": 1}, "b": {"x": 2}}), ["a", "b"])
    assert list(csv.reader((tmp_path / "d.csv").open())) == [["setting", "a", "b"], ["x", "1", "2"]]


def test_a_fair_comparison_differs_in_its_methods_definitions_only(tmp_path: Path) -> None:
    plan = stages.planned(tmp_path, methods=METHODS)
    found = {row.setting: row.values for row in differences(stages.method_settings(plan.trials))}
    own = ("lens.", "features.", "generation.")
    assert {name for name in found if not name.startswith(own)} == {
        "kind",
        "alpha",
        "task",
        "training responses",
        "teacher states",
    }
    assert found["alpha"] == {"sft": "0", "kd": "1", "seqkd": "0", "mse": "1", "distilllens": "1"}
    assert found["training responses"]["seqkd"] == "teacher's" and found["training responses"]["sft"] == "references"
    assert found["lens.weight"]["distilllens"] == "1" and found["lens.weight"]["kd"] == "–"


def test_an_unfair_one_lists_budgets_too(tmp_path: Path) -> None:
    methods = {"kd": {"alpha": 0.5}, "rkl": {"train": {"max_steps": 9, "learning_rate": [1e-3, 2e-3]}}, "sft": None}
    plan = stages.planned(tmp_path, "fair=false", methods=methods)
    found = {row.setting: dict(row.values) for row in differences(stages.method_settings(plan.trials))}
    assert found["train.max_steps"] == {"kd": "4", "rkl": "9", "sft": "4"}
    assert found["train.learning_rate"] == {"kd": "0.001", "rkl": "[0.001, 0.002]", "sft": "0.001"}
    assert found["alpha"] == {"kd": "0.5", "rkl": "1", "sft": "0"}
    assert any("budgets of their own" in note for note in stages.reading_notes(plan.comparison))


def test_states_that_no_cache_holds_are_told(tmp_path: Path) -> None:
    plan = stages.planned(
        tmp_path, methods={**METHODS, "mse": {"features": {**METHODS["mse"]["features"], "positions": "all"}}}
    )
    found = {row.setting: row.values for row in differences(stages.method_settings(plan.trials))}
    assert found["teacher states"] == {
        "sft": "none", "kd": "float32 cache", "seqkd": "none", "mse": "online", "distilllens": "float32 cache",
    }  # fmt: skip


def test_the_notes_tell_whose_batches_are_others(tmp_path: Path) -> None:
    def note(methods: dict[str, object]) -> str:
        return next(
            text for text in stages.reading_notes(stages.planned(tmp_path, methods=methods).comparison) if "data order" in text
        )

    assert note({"kd": None, "seqkd": None}).endswith("order (seqkd: in batches by the lengths of the teacher's responses).")
    assert note({"kd": None}).endswith("the same data order.")


def test_the_notes_tell_the_budget(tmp_path: Path) -> None:
    def budget(**train: object) -> str:
        plan = stages.planned(tmp_path, train={"batch_size": 6, "learning_rate": 1e-3, **train})
        return next(note for note in stages.reading_notes(plan.comparison) if note.startswith("Every trained row had"))

    assert "had 1 epoch of 6 rows, peak learning rate 0.001 and" in budget(epochs=1)
    assert "had 1.5 epochs of 6 rows" in budget(epochs=1.5)
    assert "had 4 steps of" in budget(max_steps=4) and "had 1 step of" in budget(max_steps=1)
    assert "a search over the peak learning rates 0.001, 0.002 and" in budget(max_steps=4, learning_rate=[1e-3, 2e-3])
