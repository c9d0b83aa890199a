"""Calibration against a plain derivation: one unpadded row at a time, transformers' own logits, float64, bin by bin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.examples import EncodedExample
from pipeline.errors import ModelError
from pipeline.evaluation.calibration import Calibration, calibration
from pipeline.models.lens import logit_lens

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}


@pytest.fixture
def rows() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(5)
    return [
        EncodedExample(f"row-{i}", tuple(torch.randint(300, (5 + (7 * i) % 11,), generator=generator).tolist()), 1 + i % 4)
        for i in range(9)
    ]


def calibrate(
    model: PreTrainedModel,
    rows: Sequence[EncodedExample],
    batch_size: int = 4,
    bins: int = 15,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Calibration:
    return calibration(model, logit_lens(model, vocab_size), rows, batch_size, 0, bins, chunk_tokens=chunk_tokens)


def taught(model: PreTrainedModel, rows: Sequence[EncodedExample]) -> PreTrainedModel:
    """The model after it has half learnt every second row, so that it is right now and then, with every confidence."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(14):
        for row in rows[::2]:
            ids = torch.tensor([row.input_ids])
            torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@torch.no_grad()
def plain(model: PreTrainedModel, rows: Sequence[EncodedExample], bins: int) -> dict[str, object]:
    p, labels = [], []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0].double()
        p.append(logits[row.prompt_tokens - 1 : -1].softmax(-1).numpy())
        labels += row.input_ids[row.prompt_tokens :]
    p, y = np.concatenate(p), np.array(labels)
    confidence, right = p.max(-1), p.argmax(-1) == y
    ece, table = 0.0, []
    for m in range(1, bins + 1):
        inside = ((m - 1) / bins < confidence) & (confidence <= m / bins)
        if inside.any():
            ece += inside.sum() / len(y) * abs(right[inside].mean() - confidence[inside].mean())
            table.append((100 * confidence[inside].mean(), 100 * right[inside].mean()))
        else:
            table.append((None, None))
    return {
        "ece": 100 * ece,
        "nll": -np.log(p[np.arange(len(y)), y]).mean(),
        "top1_accuracy": 100 * right.mean(),
        "confidence": 100 * confidence.mean(),
        "tokens": len(y),
        "table": table,
    }


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_equals_a_plain_derivation(family: str, bins: int, rows: list[EncodedExample]) -> None:
    model = taught(FAMILIES[family](layers=2), rows)
    found, expected = calibrate(model, rows, bins=bins), plain(model, rows, bins)
    for name in ("ece", "nll", "top1_accuracy", "confidence"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=2e-5), name
    assert found.tokens == expected["tokens"] == sum(entry.count for entry in found.bins)
    for index, (entry, (confidence, accuracy)) in enumerate(zip(found.bins, expected["table"], strict=True)):
        assert (entry.low, entry.high) == (pytest.approx(100 * index / bins), pytest.approx(100 * (index + 1) / bins))
        assert (entry.count == 0) == (entry.confidence is None) == (entry.accuracy is None) == (confidence is None)
        if confidence is not None:
            assert (entry.confidence, entry.accuracy) == (pytest.approx(confidence, rel=2e-5), pytest.approx(accuracy))
    # Right and wrong, sure and unsure: a number computed from the wrong one would show.
    assert 5 < found.top1_accuracy < 95 and found.ece > 1
    assert bins == 1 or sum(entry.count > 0 for entry in found.bins) > bins // 2


def fixed(probabilities: dict[int, float]) -> PreTrainedModel:
    """A model that predicts the same distribution everywhere."""
    model = tiny.llama(layers=1, tie=False)
    head = torch.nn.Linear(32, 300)
    torch.nn.init.zeros_(head.weight)
    head.bias.data.fill_(-float("inf"))
    for token, probability in probabilities.items():
        head.bias.data[token] = math.log(probability)
    model.lm_head = head
    return model.eval()


def test_by_hand() -> None:
    # Confidence 0.58 everywhere, right twice in eight tokens: 0.58 lies in the 9th of 15 bins, (8/15, 9/15].
    model = fixed({7: 0.58, 8: 0.25, 9: 0.17})
    found = calibrate(model, [EncodedExample("a", (1, 7, 8, 9, 7), 1), EncodedExample("b", (1, 2, 8, 8, 9, 8), 2)])
    assert found.ece == pytest.approx(58 - 25) and found.top1_accuracy == 25 and found.confidence == pytest.approx(58)
    assert found.nll == pytest.approx(-(2 * math.log(0.58) + 4 * math.log(0.25) + 2 * math.log(0.17)) / 8)
    assert [entry.count for entry in found.bins] == [0] * 8 + [8] + [0] * 6
    assert (found.bins[8].confidence, found.bins[8].accuracy) == (pytest.approx(58), 25)


def test_a_certain_model_is_in_the_last_bin_and_its_error_is_how_often_it_errs() -> None:
    found = calibrate(fixed({7: 1.0}), [EncodedExample("a", (1, 7, 7, 7, 7), 1)])
    assert (found.ece, found.nll, found.top1_accuracy, found.confidence) == (0, 0, 100, 100)
    assert found.bins[-1].count == 4
    found = calibrate(fixed({7: 1.0 - 1e-6, 8: 1e-6}), [EncodedExample("a", (1, 8, 7, 8, 8), 1)])
    assert found.ece == pytest.approx(75, abs=1e-3) and found.bins[-1].count == 4


def test_a_confidence_between_two_bins_is_in_the_lower_one() -> None:
    found = calibrate(fixed({7: 0.5, 8: 0.5}), [EncodedExample("a", (1, 7, 8), 1)], bins=2)
    assert [entry.count for entry in found.bins] == [2, 0] and found.bins[0].confidence == 50


@torch.no_grad()
def test_errors_of_different_bins_do_not_cancel() -> None:
    """Over-confident where it is sure and under-confident where it is not: right on average, yet badly calibrated."""
    model = tiny.llama(layers=1, tie=False)
    # Blocks that add nothing and no norm: the token before decides alone, by the first entry of its embedding.
    for weights in model.model.layers.parameters():
        weights.zero_()
    model.model.norm = torch.nn.Identity()
    embeddings, head = model.model.embed_tokens.weight.zero_(), torch.nn.Linear(32, 300)
    embeddings[[1, 7], 0], embeddings[[2, 8], 0] = 1.0, -1.0
    head.weight.zero_()
    head.bias.fill_(-float("inf"))
    for token, sure, unsure in ((7, 0.9, 0.4), (9, 0.05, 0.3), (10, 0.05, 0.3)):
        head.bias[token] = (math.log(sure) + math.log(unsure)) / 2
        head.weight[token, 0] = (math.log(sure) - math.log(unsure)) / 2
    model.lm_head = head
    found = calibrate(
        model, [EncodedExample("sure", (1, 7, 9), 1), EncodedExample("b", (2, 7), 1), EncodedExample("c", (8, 7), 1)], bins=4
    )
    assert [(entry.count, entry.accuracy) for entry in found.bins] == [(0, None), (2, 100.0), (0, None), (2, 50.0)]
    assert found.ece == pytest.approx((60 + 40) / 2, rel=1e-6)
    assert abs(found.confidence - found.top1_accuracy) == pytest.approx(10, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 1), (2, 5), (9, None), (100, 3)])
def test_batches_and_chunks_change_nothing(rows: list[EncodedExample], batch_size: int, chunk_tokens: int | None) -> None:
    model = taught(tiny.gpt2(layers=2), rows)
    expected = asdict(calibrate(model, rows))
    found = asdict(calibrate(model, rows[::-1], batch_size, chunk_tokens=chunk_tokens))
    for one, other in zip(found.pop("bins"), expected.pop("bins"), strict=True):
        assert {**one, "confidence": None} == {**other, "confidence": None}
        assert (one["confidence"] or 0) == pytest.approx(other["confidence"] or 0, rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)


def test_only_a_chunk_of_logits_is_made_at_a_time(rows: list[EncodedExample], logit_rows: list[int]) -> None:
    model = tiny.llama(layers=2)
    lens = logit_lens(model)
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the model made all of its logits"))
    logit_rows.clear()  # a lens tries its head
    found = calibration(model, lens, rows, 9, 0, chunk_tokens=4)
    assert max(logit_rows) == 4 and sum(logit_rows) == found.tokens


def test_prompt_tokens_do_not_count_and_one_response_token_is_enough(rows: list[EncodedExample]) -> None:
    model = tiny.llama(layers=2)
    row = EncodedExample("a", rows[1].input_ids, len(rows[1].input_ids) - 1)
    found = calibrate(model, [row])
    assert found.tokens == 1 and found.top1_accuracy in (0, 100)
    longer = calibrate(model, [replace(row, prompt_tokens=1)])
    assert longer.tokens == len(row.input_ids) - 1 and longer.nll != pytest.approx(found.nll, rel=1e-3)


def test_entries_beyond_the_shared_vocabulary_take_no_part(rows: list[EncodedExample]) -> None:
    model = tiny.llama(layers=2, vocab=320)
    found = calibrate(model, rows, vocab_size=300)
    whole = calibrate(model, rows)
    model.resize_token_embeddings(300)
    assert found.nll == pytest.approx(calibrate(model, rows).nll, rel=1e-6)
    assert found.nll < whole.nll


def test_what_cannot_be_calibrated_is_refused(rows: list[EncodedExample]) -> None:
    model = tiny.llama(layers=1)
    with pytest.raises(ValueError, match="no rows"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="bins is 0"):
        calibrate(model, rows, bins=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        calibrate(model, rows, batch_size=0)
    with pytest.raises(ValueError, match="training mode"):
        calibrate(model.train(), rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_refused(value: float, rows: list[EncodedExample]) -> None:
    model = tiny.llama(layers=1)
    lens = logit_lens(model)
    model.model.norm.weight.data[3] = value
    with pytest.raises(ModelError, match="not finite numbers: it has diverged"):
        calibration(model, lens, rows, 4, 0)


def test_a_label_outside_the_shared_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="label 299 is outside the head's vocabulary of 299 entries"):
        calibrate(tiny.llama(layers=1), [EncodedExample("a", (1, 5, 299), 1)], vocab_size=299)
