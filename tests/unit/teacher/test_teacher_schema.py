from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ArtifactError, CacheMismatchError
from pipeline.teacher.cache.schema import (
    LEDGER,
    STORAGE,
    CacheKey,
    Ledger,
    ShardFacts,
    check_key,
    decode,
    encode,
    read_ledger,
    shard_schema,
    write_ledger,
)

MakeKey = Callable[..., CacheKey]


def round_trip(states: Tensor, dtype: str) -> Tensor:
    words, scale = encode(states, dtype)
    stored = torch.from_numpy(words.copy()).view(STORAGE[dtype].torch)
    return decode(stored, None if scale is None else torch.from_numpy(scale))


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)])
@given(seed=st.integers(0, 2**31), exponent=st.integers(-3, 3))
@settings(max_examples=20, deadline=None)
def test_floating_point_types_round_to_nearest(dtype: str, relative: float, seed: int, exponent: int) -> None:
    states = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    error = (round_trip(states, dtype) - states).abs()
    # float16 is subnormal below 2**-14, where its step is 2**-24.
    floor = 2**-25 if dtype == "float16" else 0.0
    assert (error <= relative * states.abs() + floor).all()


@given(seed=st.integers(0, 2**31), exponent=st.integers(-6, 6))
@settings(max_examples=20, deadline=None)
def test_int8_error_is_half_a_step_of_its_token(seed: int, exponent: int) -> None:
    states = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    states[3] *= 1000  # one loud token must not cost the others
    found = round_trip(states, "int8")
    step = states.abs().amax(dim=1, keepdim=True) / 127
    assert ((found - states).abs() <= 0.5001 * step).all()
    peak = states.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(found.gather(1, peak), states.gather(1, peak), rtol=1e-6, atol=0)


def test_a_zero_token_stays_zero_in_int8() -> None:
    assert torch.equal(round_trip(torch.zeros(2, 5), "int8"), torch.zeros(2, 5))


def test_bfloat16_states_are_stored_exactly() -> None:
    states = torch.randn(4, 8).bfloat16()
    assert torch.equal(round_trip(states, "bfloat16"), states.float())


@pytest.mark.parametrize("dtype", STORAGE)
def test_states_that_are_not_finite_are_refused(dtype: str) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(OverflowError):
            encode(torch.tensor([[1.0, value]]), dtype)


def test_float16_refuses_what_overflows_it() -> None:
    with pytest.raises(OverflowError, match=r"^7e\+04$"):
        encode(torch.tensor([[1.0, -70_000.0]]), "float16")


@pytest.mark.parametrize("dtype", STORAGE)
def test_schema_names_every_column(dtype: str) -> None:
    names = shard_schema([0, 3], 8, dtype).names
    scales = ["layer_0_scale", "layer_3_scale"] if dtype == "int8" else []
    assert sorted(names) == sorted(["id", "n", "layer_0", "layer_3", *scales])


def test_layers_are_sorted_and_unique(make_key: MakeKey) -> None:
    assert make_key(layers=(4, 0, 4, 2)) == make_key(layers=(0, 2, 4))


def test_an_unknown_dtype_is_refused(make_key: MakeKey) -> None:
    with pytest.raises(ValueError, match="'int4'; allowed: float32, bfloat16, float16, int8"):
        make_key(dtype="int4")


def test_every_difference_is_listed(make_key: MakeKey) -> None:
    found = make_key()
    expected = make_key(
        layers=(1, 2), teacher="T", tokenizer="K", template="alpaca/2", dataset="D", dtype="int8", max_tokens=128,
        final_layer_normed=False,
    )  # fmt: skip
    with pytest.raises(CacheMismatchError) as raised:
        check_key(found, expected, Path("somewhere"), more_layers=True)
    assert str(raised.value).splitlines() == [
        "somewhere: this teacher cache was made for something else",
        "  - teacher: cache has t, expected T",
        "  - tokenizer: cache has k, expected K",
        "  - template: cache has alpaca/1, expected alpaca/2",
        "  - dataset: cache has d, expected D",
        "  - layers: cache has (0, 2, 4), expected (1, 2)",
        "  - dtype: cache has float32, expected int8",
        "  - max_tokens: cache has 64, expected 128",
        "  - final_layer_normed: cache has True, expected False",
        "use a cache captured under these settings, or capture a new one into another folder",
    ]


def test_more_layers_serve_only_where_they_may(make_key: MakeKey) -> None:
    check_key(make_key(), make_key(layers=(2, 4)), Path("x"), more_layers=True)
    check_key(make_key(), make_key(), Path("x"), more_layers=False)
    with pytest.raises(CacheMismatchError, match=r"layers: cache has \(0, 2, 4\), expected \(2, 4\)"):
        check_key(make_key(), make_key(layers=(2, 4)), Path("x"), more_layers=False)


def test_ledger_round_trip(tmp_path: Path, make_key: MakeKey) -> None:
    ledger = Ledger(make_key(), 4, 32, (1, 3), (ShardFacts("a.arrow", 2, 9, 100, "00"),), finished=True)
    assert read_ledger(tmp_path) is None
    write_ledger(tmp_path, ledger)
    assert read_ledger(tmp_path) == ledger


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"layout": 1}', '{"layout": 1, "key": {"layers": [1]}, "shards": [], "part": [0, 1]}']
)
def test_a_damaged_ledger_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text)
    with pytest.raises(ArtifactError, match=r"ledger\.json: not a cache ledger .*; remove .* and capture again"):
        read_ledger(tmp_path)


def test_another_layout_is_refused(tmp_path: Path, make_key: MakeKey) -> None:
    write_ledger(tmp_path, replace(Ledger(make_key(), 4, 32, (0, 1)), layout=99))
    assert json.loads((tmp_path / LEDGER).read_text())["layout"] == 99
    with pytest.raises(ArtifactError, match="layout version 99, this program reads 1"):
        read_ledger(tmp_path)
