from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pipeline.evaluation.rouge import Scores, score, score_rows

THEIRS = RougeScorer(["rougeL"], use_stemmer=True)


def test_f_measure_by_hand() -> None:
    # Common subsequence "the cat sat" of 3; precision 3/4, recall 3/6.
    scores = score(["the cat sat down"], [["the black cat sat over there"]])
    assert scores.rouge_l == pytest.approx(100 * 2 * 0.75 * 0.5 / 1.25, abs=1e-12)


def test_order_counts() -> None:
    assert score(["b a"], [["a b"]]).rouge_l == pytest.approx(50.0)


def test_words_are_stemmed_and_punctuation_separates() -> None:
    assert score(["Running, quickly-jumped"], [["run quickly jumping"]]).rouge_l == 100.0


def test_words_up_to_three_letters_are_not_stemmed() -> None:
    assert score(["as"], [["a"]]).rouge_l == 0.0
    assert score(["yes"], [["ye"]]).rouge_l == 0.0


def test_best_reference_counts() -> None:
    assert score(["one two"], [["three", "one two", "one"]]).rouge_l == 100.0


def test_scores_are_means_over_rows_and_not_rounded() -> None:
    rows = score_rows(["a b c", "a", "x"], [["a"], ["a"], ["y"]])
    scores = score(["a b c", "a", "x"], [["a"], ["a"], ["y"]])
    assert [row.rouge_l for row in rows] == [pytest.approx(50.0), 100.0, 0.0]
    assert scores == Scores(rouge_l=sum(row.rouge_l for row in rows) / 3, exact_match=100 / 3)


@pytest.mark.parametrize(("prediction", "reference"), [("", "word"), ("word", ""), ("", ""), ("…!", "word"), ("日本", "日本")])
def test_text_without_words_scores_zero(prediction: str, reference: str) -> None:
    assert score([prediction], [[reference]]).rouge_l == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("  The Cat,\n sat! ", "the cat sat", 100.0), ("don't", "dont", 100.0), ("cats", "cat", 0.0), ("", "cat", 0.0)],
)
def test_exact_match_normalises(prediction: str, reference: str, expected: float) -> None:
    assert score([prediction], [["other", reference]]).exact_match == expected


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abcdeings ,.-'İß1\n", max_size=60),
    st.lists(st.text(alphabet="abcdeings ,.-'İß1\n", max_size=60), min_size=1, max_size=3),
)
def test_equals_rouge_score_on_any_text(prediction: str, references: list[str]) -> None:
    theirs = 100 * THEIRS.score_multi(references, prediction)["rougeL"].fmeasure
    assert score([prediction], [references]).rouge_l == theirs


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 predictions but 2"),
        (["a", "b"], [["a"]], "2 predictions but 1"),
        (["a"], [[]], r"references\[0\] is empty"),
        (["a"], ["a"], r"references\[0\] is one text"),
        ("a", [["a"]], "predictions is one text"),
        ([], [], "no rows"),
    ],
)
def test_wrong_shapes_are_refused(predictions: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


def test_runtime_does_not_need_the_rouge_score_package() -> None:
    code = "import sys; sys.modules['rouge_score'] = None; from pipeline.evaluation.rouge import score; score(['a'], [['a']])"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
