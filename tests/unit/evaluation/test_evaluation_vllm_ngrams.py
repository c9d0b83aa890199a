"""The n-gram rule for vLLM against transformers' own, and the processor against a stand-in for vLLM's interface."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from pipeline.evaluation import vllm_ngrams
from pipeline.evaluation.vllm_ngrams import PROCESSOR, ban_repeats, supported

INTERFACE = "vllm.v1.worker.gpu.sample.logits_processor"
VOCABULARY = 5


class Interface:
    """vLLM's base class, which is abstract in `apply` only."""


@pytest.fixture
def processor_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class as a vLLM worker finds it: by its name."""
    module: Any = ModuleType(INTERFACE)
    module.LogitsProcessor = Interface
    monkeypatch.setitem(sys.modules, INTERFACE, module)
    vllm_ngrams._processor.cache_clear()
    module_name, _, class_name = PROCESSOR.partition(":")
    yield getattr(importlib.import_module(module_name), class_name)
    vllm_ngrams._processor.cache_clear()


def expected(row: list[int], size: int, logits: torch.Tensor) -> torch.Tensor:
    return NoRepeatNGramLogitsProcessor(size)(torch.tensor([row]), logits[None].clone())[0] if size else logits


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_rule_is_that_of_transformers(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    # Few different tokens, so that there is much to ban; whole cycles, so that long n-grams return.
    rows = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (1, 2, 5, 9, 20, 40)]
    rows += [[0, 1, 2, 3] * 4, [4] * 12, [1, 2] * 3 + [1]]
    tokens = torch.full((len(rows), 64), 3, dtype=torch.int32)  # what lies behind a row is another request's
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    logits = torch.randn(len(rows), VOCABULARY, generator=generator)
    found = logits.clone()
    ban_repeats(found, tokens, torch.tensor([len(row) for row in rows]), size)
    for index, row in enumerate(rows):
        assert torch.equal(found[index], expected(row, size, logits[index])), row
    assert 0 < int(found.isinf().sum()) < found.numel()


def test_rows_shorter_than_the_ngram_are_left_alone() -> None:
    logits = torch.zeros(2, VOCABULARY)
    ban_repeats(logits, torch.tensor([[1, 1], [1, 1]]), torch.tensor([2, 1]), 3)
    assert not logits.isinf().any()


def request(size: int | None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=None if size is None else {"no_repeat_ngram_size": size})


class Engine:
    """Request slots and steps as vLLM's V2 model runner lays them out."""

    def __init__(self, processor_class: Any, slots: int = 6) -> None:
        self.tokens = torch.zeros(slots, 32, dtype=torch.int32)
        self.rows: dict[int, list[int]] = {}
        states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=self.tokens), max_num_reqs=slots)
        self.processor = processor_class(SimpleNamespace(speculative_config=None), states)

    def add(self, slot: int, row: list[int], size: int | None) -> bool:
        self.rows[slot] = row
        self.tokens[slot, : len(row)] = torch.tensor(row)
        return bool(self.processor.add_request(slot, request(size)))

    def step(self, slots: list[int], logits: torch.Tensor) -> torch.Tensor:
        lengths = [len(self.rows[slot]) for slot in slots]
        context = SimpleNamespace(
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots, dtype=np.int32),
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
        )
        found = self.processor.apply(logits.clone(), context)
        assert isinstance(found, torch.Tensor)
        return found


def test_each_request_of_a_batch_has_its_own_size(processor_class: Any) -> None:
    engine, sizes = Engine(processor_class), {4: 2, 1: 0, 3: 3, 0: 2, 5: None}
    rows = {4: [1, 2, 3, 1], 1: [1, 2, 1, 2, 1], 3: [4, 0, 1, 4, 0, 2, 4, 0], 0: [2], 5: [1, 1, 1]}
    affected = {slot: engine.add(slot, rows[slot], size) for slot, size in sizes.items()}
    assert affected == {4: True, 1: False, 3: True, 0: True, 5: False}
    order = [3, 5, 4, 0, 1]
    logits = torch.randn(5, VOCABULARY)
    found = engine.step(order, logits)
    for index, slot in enumerate(order):
        assert torch.equal(found[index], expected(rows[slot], sizes[slot] or 0, logits[index])), slot
    assert found.isinf().sum(-1).tolist() == [2, 0, 1, 0, 0]


def test_a_request_grows_and_its_slot_is_used_again(processor_class: Any) -> None:
    engine = Engine(processor_class)
    engine.add(2, [1, 2, 3, 4], 2)
    assert not engine.step([2], torch.zeros(1, VOCABULARY)).isinf().any()
    engine.rows[2].append(1)
    engine.tokens[2, 4] = 1
    assert engine.step([2], torch.zeros(1, VOCABULARY)).isinf().tolist() == [[False, False, True, False, False]]
    assert not engine.add(2, [1, 2, 1], None)
    assert not engine.step([2], torch.zeros(1, VOCABULARY)).isinf().any()


def test_speculative_decoding_is_refused(processor_class: Any) -> None:
    states = SimpleNamespace(all_token_ids=None, max_num_reqs=1)
    with pytest.raises(ValueError, match="does not work with speculative decoding"):
        processor_class(SimpleNamespace(speculative_config=object()), states)


@pytest.mark.parametrize("size", [-1, 2.5, "6"])
def test_a_size_that_is_none_is_refused(processor_class: Any, size: Any) -> None:
    with pytest.raises(ValueError, match="it must be a whole number, 0 or more"):
        processor_class.validate_params(request(size))


@pytest.mark.parametrize("size", [None, 0, 6])
def test_every_other_size_passes(processor_class: Any, size: int | None) -> None:
    processor_class.validate_params(request(size))


def test_the_class_is_one_of_vllms_and_always_the_same(processor_class: Any) -> None:
    assert issubclass(processor_class, Interface) and vllm_ngrams.NoRepeatNgrams is processor_class
    assert supported()


def test_without_the_interface_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, INTERFACE, None)
    assert not supported()
    with pytest.raises(AttributeError, match="has no attribute Other"):
        _ = vllm_ngrams.Other
