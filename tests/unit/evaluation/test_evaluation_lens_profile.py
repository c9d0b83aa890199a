"""The lens profile against a plain derivation: one row at a time, float64, the paper's g(c)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError, ConfigError
from pipeline.evaluation.lens_profile import (
    LayerProfile,
    LensHeat,
    lens_profile,
    position_divergences,
    read_heat,
    read_profiles,
    write_heat,
    write_profiles,
)
from pipeline.models.layers import LayerPair
from pipeline.models.lens import logit_lens
from pipeline.models.student import prune
from pipeline.teacher.online import OnlineTeacher

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}
PAIRS = ((0, 0), (1, 2), (2, 3), (3, 6))


def unusual_norm(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a final norm that visibly changes its input, even what is normed already."""
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return model


@pytest.fixture
def rows() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(5)
    return [
        EncodedExample(f"row-{i}", tuple(torch.randint(300, (5 + (7 * i) % 11,), generator=generator).tolist()), 1 + i % 4)
        for i in range(7)
    ]


def profile(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Sequence[EncodedExample],
    pairs: Sequence[LayerPair] = PAIRS,
    final_norm: bool = False,
    batch_size: int = 3,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[LayerProfile]:
    return lens_profile(
        student, logit_lens(student, vocab_size), OnlineTeacher(teacher), logit_lens(teacher, vocab_size), rows, pairs,
        final_norm=final_norm, batch_size=batch_size, pad_token_id=0, chunk_tokens=chunk_tokens,
    )  # fmt: skip


def divergences(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    row: EncodedExample,
    final_norm: bool = False,
    pairs: Sequence[LayerPair] = PAIRS,
    vocab_size: int | None = None,
) -> np.ndarray:
    """[pairs, response tokens]"""
    return position_divergences(
        student, logit_lens(student, vocab_size), OnlineTeacher(teacher), logit_lens(teacher, vocab_size), row, pairs,
        final_norm=final_norm, pad_token_id=0,
    ).numpy()  # fmt: skip


def distributions(model: PreTrainedModel, row: EncodedExample, final_norm: bool) -> list[np.ndarray]:
    """[response tokens, V] after each layer, from transformers' own states of the unpadded row."""
    with torch.no_grad():
        output = model(torch.tensor([row.input_ids]), output_hidden_states=True)
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    found = []
    for layer, state in enumerate(output.hidden_states):
        last = layer == len(output.hidden_states) - 1
        state = state[0, row.prompt_tokens - 1 : -1]
        with torch.no_grad():
            logits = model.get_output_embeddings()(norm(state) if final_norm and not last else state).double().numpy()
        if last:
            np.testing.assert_allclose(logits, output.logits[0, row.prompt_tokens - 1 : -1].numpy(), atol=1e-5)
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        found.append(exponentials / exponentials.sum(-1, keepdims=True))
    return found


def plain(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[EncodedExample], pair: LayerPair, final_norm: bool
) -> dict[str, float]:
    """The definitions, entry by entry."""
    p = np.concatenate([distributions(teacher, row, final_norm)[pair[1]] for row in rows])
    q = np.concatenate([distributions(student, row, final_norm)[pair[0]] for row in rows])
    c = q / p
    entries = 0.5 * p * (c * np.log(c) - (1 + c) * np.log((1 + c) / 2))
    return {
        "tokens": len(p),
        "jsd": entries.sum() / len(p),
        "jsd_over": entries[c > 1].sum() / len(p),
        "jsd_under": entries[c < 1].sum() / len(p),
        "teacher_entropy": -(p * np.log(p)).sum() / len(p),
        "student_entropy": -(q * np.log(q)).sum() / len(p),
        "over_confident_mass": q[c > 2].sum() / len(p),
        "under_confident_mass": p[c < 0.5].sum() / len(p),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
    }


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_measure_equals_a_plain_derivation(family: str, final_norm: bool, rows: list[EncodedExample]) -> None:
    teacher = unusual_norm(FAMILIES[family](layers=6))
    student = unusual_norm(FAMILIES[family](layers=3, width=24, seed=1))
    found = profile(student, teacher, rows, final_norm=final_norm)
    assert [(layer.student_layer, layer.teacher_layer) for layer in found] == list(PAIRS)
    assert [layer.final for layer in found] == [False, False, False, True]
    for layer in found:
        expected = plain(student, teacher, rows, (layer.student_layer, layer.teacher_layer), final_norm)
        for name, value in expected.items():
            assert getattr(layer, name) == pytest.approx(value, rel=2e-5, abs=2e-7), (layer.student_layer, name)
        # Neither side is empty, so a measure of the wrong one would show.
        assert layer.jsd_over > 1e-3 and layer.jsd_under > 1e-3 and 0.01 < layer.over_confident_mass < 1
        assert layer.jsd == pytest.approx(layer.jsd_over + layer.jsd_under, rel=1e-5) and layer.jsd < math.log(2)


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_equals_a_plain_derivation_and_their_mean_the_profile(
    family: str, final_norm: bool, rows: list[EncodedExample]
) -> None:
    teacher = unusual_norm(FAMILIES[family](layers=6))
    student = unusual_norm(FAMILIES[family](layers=3, width=24, seed=1))
    for row in rows[:3]:
        found = divergences(student, teacher, row, final_norm)
        assert found.shape == (len(PAIRS), len(row.input_ids) - row.prompt_tokens)
        ours, theirs = distributions(student, row, final_norm), distributions(teacher, row, final_norm)
        for line, (own, other) in zip(found, PAIRS, strict=True):
            p, q = theirs[other], ours[own]
            m = (p + q) / 2
            expected = 0.5 * (p * np.log(p / m)).sum(-1) + 0.5 * (q * np.log(q / m)).sum(-1)
            np.testing.assert_allclose(line, expected, rtol=2e-5, atol=2e-7)
        means = [layer.jsd for layer in profile(student, teacher, [row], final_norm=final_norm)]
        assert found.mean(-1) == pytest.approx(means, rel=1e-5)


def test_what_comes_after_a_position_does_not_change_it(rows: list[EncodedExample]) -> None:
    teacher, student = tiny.llama(layers=6), tiny.llama(layers=3, seed=1)
    row = max(rows, key=lambda row: len(row.input_ids))
    whole = divergences(student, teacher, row)
    cut = divergences(student, teacher, replace(row, input_ids=row.input_ids[:-2]))
    np.testing.assert_allclose(whole[:, :-2], cut, rtol=1e-5, atol=1e-7)


def test_positions_are_measured_as_profiles_are(rows: list[EncodedExample]) -> None:
    teacher, student = tiny.gpt2(layers=6), tiny.gpt2(layers=3, seed=1, dropout=0.5)
    expected = divergences(student, teacher, rows[0])
    student.train()
    np.testing.assert_array_equal(divergences(student, teacher, rows[0]), expected)
    assert student.training
    with pytest.raises(ConfigError, match=r"pairs\[0\]: student layer 5 does not exist"):
        divergences(student, teacher, rows[0], pairs=[(5, 1)])
    with pytest.raises(ValueError, match="compares 304 vocabulary entries, the teacher's 300"):
        divergences(tiny.llama(vocab=304), tiny.llama(), rows[0], pairs=[(1, 1)])


def test_the_teacher_itself_agrees_with_the_teacher(rows: list[EncodedExample]) -> None:
    teacher = tiny.llama(layers=6)
    for layer in profile(teacher, tiny.llama(layers=6), rows, [(layer, layer) for layer in range(7)], final_norm=True):
        assert (layer.jsd, layer.jsd_over, layer.jsd_under) == (0, 0, 0)
        assert (layer.over_confident_mass, layer.under_confident_mass, layer.top1_agreement) == (0, 0, 1)
        assert layer.teacher_entropy == layer.student_entropy > 0


def test_a_pruned_student_differs_only_behind_the_cut(rows: list[EncodedExample]) -> None:
    teacher = tiny.llama(layers=6)
    student, origin = prune(teacher, 2, 2)
    found = profile(student, teacher, rows, list(enumerate(origin)))
    assert [layer.jsd == 0 for layer in found] == [True, True, True, False, False]


def test_exchanging_the_models_exchanges_the_sides(rows: list[EncodedExample]) -> None:
    teacher, student = tiny.llama(layers=4), tiny.llama(layers=4, seed=1)
    there = profile(student, teacher, rows, [(2, 3)])[0]
    back = profile(teacher, student, rows, [(3, 2)])[0]
    exchanged = replace(
        back, student_layer=2, teacher_layer=3, jsd_over=back.jsd_under, jsd_under=back.jsd_over,
        teacher_entropy=back.student_entropy, student_entropy=back.teacher_entropy,
        over_confident_mass=back.under_confident_mass, under_confident_mass=back.over_confident_mass,
    )  # fmt: skip
    assert there.jsd_over != pytest.approx(there.jsd_under, rel=1e-3)
    assert asdict(there) == pytest.approx(asdict(exchanged), rel=1e-5)


def test_distributions_without_a_common_token(rows: list[EncodedExample]) -> None:
    """The head of each model puts all mass on a token of its own: the divergence is log 2, half of it from either side."""
    teacher, student = tiny.llama(layers=2, tie=False), tiny.llama(layers=2, tie=False, seed=1)
    for model, token in ((teacher, 7), (student, 11)):
        model.model.norm.weight.data.zero_()
        head = torch.nn.Linear(32, 300)
        torch.nn.init.zeros_(head.weight)
        head.bias.data.fill_(-float("inf"))[token] = 0.0
        model.lm_head = head
    layer = profile(student, teacher, rows, [(2, 2)])[0]
    assert layer.jsd_over == layer.jsd_under == pytest.approx(0.5 * math.log(2))
    assert (layer.over_confident_mass, layer.under_confident_mass, layer.top1_agreement) == (1, 1, 0)
    assert (layer.teacher_entropy, layer.student_entropy) == (0, 0)


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 1), (2, 5), (7, None), (100, 3)])
def test_batches_and_chunks_change_nothing(rows: list[EncodedExample], batch_size: int, chunk_tokens: int | None) -> None:
    teacher, student = tiny.gpt2(layers=6), tiny.gpt2(layers=3, seed=1)
    expected = profile(student, teacher, rows, batch_size=4)
    found = profile(student, teacher, rows, batch_size=batch_size, chunk_tokens=chunk_tokens)
    for layer, other in zip(found, expected, strict=True):
        assert asdict(layer) == pytest.approx(asdict(other), rel=1e-5)


def test_only_a_chunk_of_logits_is_made_at_a_time(rows: list[EncodedExample], logit_rows: list[int]) -> None:
    teacher, student = tiny.llama(layers=6), tiny.llama(layers=3, seed=1)
    lenses = logit_lens(student), logit_lens(teacher)
    for model in (teacher, student):
        model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("a model made all of its logits"))
    logit_rows.clear()  # a lens tries its head
    found = lens_profile(
        student, lenses[0], OnlineTeacher(teacher), lenses[1], rows, [(1, 2)],
        final_norm=False, batch_size=7, pad_token_id=0, chunk_tokens=4,
    )  # fmt: skip
    assert max(logit_rows) == 4 and sum(logit_rows) == 2 * found[0].tokens


def test_the_final_norm_never_reaches_the_last_layer(rows: list[EncodedExample]) -> None:
    teacher, student = unusual_norm(tiny.llama(layers=6)), unusual_norm(tiny.llama(layers=3, seed=1))
    raw, normed = (profile(student, teacher, rows, [(1, 2), (3, 6)], final_norm=flag) for flag in (False, True))
    assert raw[1] == normed[1]
    assert abs(raw[0].jsd - normed[0].jsd) > 1e-3


def test_prompt_tokens_do_not_count(rows: list[EncodedExample]) -> None:
    teacher, student = tiny.llama(layers=4), tiny.llama(layers=4, seed=1)
    row = EncodedExample("a", rows[3].input_ids, 3)
    response = profile(student, teacher, [row], [(2, 2)])[0]
    assert response.tokens == len(row.input_ids) - 3
    everything = profile(student, teacher, [replace(row, prompt_tokens=1)], [(2, 2)])[0]
    assert everything.tokens == len(row.input_ids) - 1 and everything.jsd != pytest.approx(response.jsd, rel=1e-3)


def test_padded_heads_are_compared_on_the_prefix(rows: list[EncodedExample]) -> None:
    teacher, student = tiny.llama(layers=4, vocab=320), tiny.llama(layers=4, vocab=304, seed=1)
    found = profile(student, teacher, rows, [(2, 2)], vocab_size=300)[0]
    for model in (teacher, student):
        model.resize_token_embeddings(300)
    assert asdict(found) == pytest.approx(asdict(profile(student, teacher, rows, [(2, 2)])[0]), rel=1e-5)


def test_the_student_is_evaluated_without_dropout_and_left_as_it_was(rows: list[EncodedExample]) -> None:
    teacher, student = tiny.gpt2(layers=4), tiny.gpt2(layers=2, seed=1, dropout=0.5)
    expected = profile(student, teacher, rows, [(1, 2)])
    student.train()
    assert profile(student, teacher, rows, [(1, 2)]) == expected
    assert student.training


def test_progress_counts_rows(rows: list[EncodedExample]) -> None:
    teacher, told = tiny.llama(layers=2), list[int]()
    lens = logit_lens(teacher)
    lens_profile(
        teacher, lens, OnlineTeacher(teacher), lens, rows, [(1, 1)],
        final_norm=False, batch_size=3, pad_token_id=0, progress=told.append,
    )  # fmt: skip
    assert told == [3, 3, 1]


def test_what_cannot_be_profiled_is_refused(rows: list[EncodedExample]) -> None:
    teacher = tiny.llama(layers=4)
    with pytest.raises(ConfigError, match=r"pairs\[0\]: student layer 5 does not exist"):
        profile(teacher, teacher, rows, [(5, 1)])
    with pytest.raises(ValueError, match="no rows"):
        profile(teacher, teacher, [], [(1, 1)])
    with pytest.raises(ValueError, match="compares 304 vocabulary entries, the teacher's 300"):
        profile(tiny.llama(vocab=304), teacher, rows, [(1, 1)])


def test_profiles_survive_a_file(rows: list[EncodedExample], tmp_path: Path) -> None:
    teacher, student = tiny.llama(layers=6), tiny.llama(layers=3, seed=1)
    profiles = {"untrained": profile(student, teacher, rows), "distilllens s10": profile(student, teacher, rows, [(3, 6)])}
    write_profiles(tmp_path / "lens.json", profiles)
    assert read_profiles(tmp_path / "lens.json") == profiles
    assert list(read_profiles(tmp_path / "lens.json")) == ["untrained", "distilllens s10"]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": [{"jsd": 1}]}', '{"a": ["b"]}'])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "lens.json").write_text(content)
    with pytest.raises(ArtifactError, match="lens.json: holds no lens profiles"):
        read_profiles(tmp_path / "lens.json")
    with pytest.raises(ArtifactError, match="absent.json: holds no lens profiles"):
        read_profiles(tmp_path / "absent.json")


HEAT = LensHeat(("␣a", "↵", "猫"), ((1, 2), (3, 6)), ((0.1, 0.0, 0.2), (0.25, math.log(2), 0.5)))


def test_a_heat_map_survives_a_file(tmp_path: Path) -> None:
    write_heat(tmp_path / "heat.json", HEAT)
    assert read_heat(tmp_path / "heat.json") == HEAT


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ()},
        {"tokens": ("a", "b")},
        {"pairs": (), "jsd": ()},
        {"pairs": ((1, 2),)},
        {"jsd": ((0.1, 0.0, 0.2), (0.25, 0.5))},
        {"jsd": ((0.1, 0.0, 0.2), (0.25, 0.7, 0.5))},
        {"jsd": ((0.1, -0.01, 0.2), (0.25, 0.5, 0.5))},
        {"jsd": ((0.1, 0.0, 0.2), (0.25, float("nan"), 0.5))},
    ],
)
def test_numbers_that_are_no_heat_map_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divergence"):
        replace(HEAT, **changes)
    (tmp_path / "heat.json").write_text(json.dumps({**asdict(HEAT), **changes}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"holds no lens heat map \(.*divergence.*\); remove its folder"):
        read_heat(tmp_path / "heat.json")


@pytest.mark.parametrize("content", ["", "[1]", "5", '{"tokens": ["a"]}', '{"tokens": ["a"], "pairs": [1], "jsd": [[0]]}'])
def test_another_file_is_no_heat_map(content: str, tmp_path: Path) -> None:
    (tmp_path / "heat.json").write_text(content)
    with pytest.raises(ArtifactError, match="heat.json: holds no lens heat map"):
        read_heat(tmp_path / "heat.json")
    with pytest.raises(ArtifactError, match="absent.json: holds no lens heat map"):
        read_heat(tmp_path / "absent.json")
