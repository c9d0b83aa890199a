"""Layer maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.errors import ConfigError
from pipeline.models.layers import check_pairs, first_pairs, last_pairs, provenance_pairs, uniform_pairs


def test_the_papers_pairs() -> None:
    assert uniform_pairs(3, 12, 48, "x") == ((3, 12), (6, 24), (9, 36))
    assert uniform_pairs(5, 12, 48, "x") == ((2, 8), (4, 16), (6, 24), (8, 32), (10, 40))
    assert uniform_pairs(5, 20, 30, "x") == ((3, 5), (7, 11), (10, 15), (13, 20), (17, 26))


def test_provenance_follows_the_dropped_block() -> None:
    origin = [0, 1, 2, 3, 8, 9, 10]
    assert provenance_pairs(2, origin, "x") == ((2, 2), (4, 8))


def test_first_and_last_layers() -> None:
    assert first_pairs(3, 12, 48, "x") == ((1, 4), (2, 8), (3, 12))
    assert last_pairs(3, 12, 48, "x") == ((9, 36), (10, 40), (11, 44))
    assert last_pairs(11, 12, 48, "x") == first_pairs(11, 12, 48, "x")
    assert first_pairs(2, 20, 30, "x") == ((1, 2), (2, 3))


@pytest.mark.parametrize("choose", [first_pairs, last_pairs])
def test_the_final_layer_is_no_intermediate_one(choose: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="x: 12 pairs, but a student of 12 layers has 11"):
        choose(12, 12, 48, "x")


def test_too_many_pairs() -> None:
    with pytest.raises(ConfigError, match="methods.d.lens.pairs: 5 pairs, but a student of 4 layers has 3"):
        uniform_pairs(5, 4, 8, "methods.d.lens.pairs")


def test_explicit_pairs_are_checked_all_at_once() -> None:
    assert check_pairs([(0, 0), (4, 8)], 4, 8, "x") == ((0, 0), (4, 8))
    with pytest.raises(ConfigError) as caught:
        check_pairs([(5, 2), (1, 9), (-1, 0)], 4, 8, "m")
    assert len(caught.value.problems) == 3
    first = "m[0]: student layer 5 does not exist, the student has 0 (embeddings) to 4; give one of them"
    assert first in caught.value.problems
