"""ROUGE-L and exact match of predictions against one or more references, as 0–100."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_WORD = re.compile(r"[a-z0-9]+")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LONGEST_UNSTEMMED = 3
_STEMMER = PorterStemmer()


@dataclass(frozen=True)
class Scores:
    """Means over the rows, 0–100, unrounded."""

    rouge_l: float
    exact_match: float


@dataclass(frozen=True, slots=True)
class RowScores:
    """One row's scores, 0–100; `exact_match` is 0 or 100."""

    rouge_l: float
    exact_match: float


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Mean scores of a benchmark; see `score_rows` for the metrics and the errors.

    Raises:
        ValueError: there are no rows, besides the cases of `score_rows`.
    """
    rows = score_rows(predictions, references)
    if not rows:
        raise ValueError("no rows to score; give at least one prediction")
    return Scores(
        rouge_l=sum(row.rouge_l for row in rows) / len(rows),
        exact_match=sum(row.exact_match for row in rows) / len(rows),
    )


def score_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[RowScores]:
    """Score every row against the best of its references.

    ROUGE-L is the F-measure (β = 1) of the longest common subsequence of Porter-stemmed words, Lin (2004), section 3,
    with the numbers of the rouge-score package; a text without words scores 0. Exact match compares texts in lower
    case, without ASCII punctuation and with folded spaces.

    Args:
        predictions: one text per row.
        references: acceptable texts of each row, at least one per row.

    Raises:
        ValueError: the lengths differ, a row has no references, or a text stands where a list belongs.
    """
    _check(predictions, references)
    number = _stem_numbers()
    return [_score_row(prediction, texts, number) for prediction, texts in zip(predictions, references, strict=True)]


def check_paired(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Make sure that there is a row of references for each prediction.

    Raises:
        ValueError: the lengths differ, or predictions is one text.
    """
    if isinstance(predictions, str):
        raise ValueError("predictions is one text; give a list of texts")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but {len(references)} rows of references; give one row per prediction"
        )


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    check_paired(predictions, references)
    for row, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"references[{row}] is one text; give a list of texts")
        if not texts:
            raise ValueError(f"references[{row}] is empty; give at least one reference")


def _score_row(prediction: str, references: Sequence[str], number: Callable[[str], int]) -> RowScores:
    words = _words(prediction)
    numbers = list(map(number, words))
    best, exact = 0.0, False
    for reference in references:
        reference_words = _words(reference)
        best = max(best, _f_measure(numbers, list(map(number, reference_words))))
        # Texts that match have the same letters and digits; that is cheap to see, and most have not.
        exact = exact or ("".join(words) == "".join(reference_words) and _normalise(prediction) == _normalise(reference))
    return RowScores(rouge_l=100 * best, exact_match=100.0 if exact else 0.0)


def _f_measure(prediction: list[int], reference: list[int]) -> float:
    # Precision and recall are rounded to floats first, as rouge-score does: the numbers are the same to the last bit.
    common = LCSseq.similarity(prediction, reference) if prediction and reference else 0
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _stem_numbers() -> Callable[[str], int]:
    """Word → number of its stem. Numbers compare faster than words, and unlike hashes of words they cannot collide."""
    numbers: dict[str, int] = {}

    @functools.cache
    def number(word: str) -> int:
        return numbers.setdefault(_stem(word), len(numbers))

    return number


@functools.lru_cache(maxsize=1 << 17)
def _stem(word: str) -> str:
    return str(_STEMMER.stem(word)) if len(word) > _LONGEST_UNSTEMMED else word


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())
