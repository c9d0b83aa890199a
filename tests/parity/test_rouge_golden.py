"""ROUGE-L and exact match against the numbers of the paper's code and of the rouge-score package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipeline.evaluation.rouge import score, score_rows


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "rouge.json").read_text(encoding="utf-8"))


def _texts(golden: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return [row["prediction"].strip() for row in golden["rows"]], [row["references"] for row in golden["rows"]]


def test_every_row_equals_the_golden(golden: dict[str, Any]) -> None:
    rows = score_rows(*_texts(golden))
    # The golden file holds four decimals.
    assert [round(row.rouge_l, 4) for row in rows] == [row["rouge_l"] for row in golden["rows"]]


def test_totals_equal_the_golden(golden: dict[str, Any]) -> None:
    scores = score(*_texts(golden))
    assert round(scores.rouge_l, 4) == golden["total"]["rougeL"]
    assert round(scores.exact_match, 4) == golden["total"]["exact_match"]


def test_every_row_equals_rouge_score_to_the_last_bit(golden: dict[str, Any]) -> None:
    predictions, references = _texts(golden)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    theirs = [
        100 * scorer.score_multi(texts, text)["rougeL"].fmeasure for text, texts in zip(predictions, references, strict=True)
    ]
    assert [row.rouge_l for row in score_rows(predictions, references)] == theirs
