"""Exposure bias against the definition: one unpadded row and one step at a time, transformers' own logits, float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.evaluation.exposure import ExposureBias, excess_accumulated_error
from pipeline.models.lens import logit_lens

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}
LENGTHS = (1, 2, 5, 9, 14)


@pytest.fixture
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny.llama(layers=3), tiny.llama(layers=2, width=24, seed=1)


@pytest.fixture
def sequences() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]]:
    """(student's rows, oracle's rows, prompt lengths): responses of 1 to 13 tokens, unequal within a row."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 300, (count,), generator=generator).tolist())

    prompts = [tokens(1 + (5 * row) % 7) for row in range(8)]
    own = [prompt + tokens((3 * row) % 13) + (0,) for row, prompt in enumerate(prompts)]
    oracle = [prompt + tokens((7 * row + 4) % 12) + (0,) for row, prompt in enumerate(prompts)]
    return own, oracle, [len(prompt) for prompt in prompts]


def measure(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    own: Sequence[Sequence[int]],
    oracle: Sequence[Sequence[int]],
    prompts: Sequence[int],
    lengths: Sequence[int] = LENGTHS,
    batch_size: int = 3,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> ExposureBias:
    return excess_accumulated_error(
        teacher, logit_lens(teacher, vocab_size), student, logit_lens(student, vocab_size), own, oracle, prompts, lengths,
        batch_size, 0, chunk_tokens=chunk_tokens,
    )  # fmt: skip


@torch.no_grad()
def step_error(teacher: PreTrainedModel, student: PreTrainedModel, prefix: Sequence[int]) -> float:
    """Sum of p · log(p / q) over the vocabulary for the token after `prefix`."""
    p, q = (model(torch.tensor([list(prefix)])).logits[0, -1].double().softmax(-1) for model in (teacher, student))
    return float((p * (p / q).log()).sum())


def accumulated(
    teacher: PreTrainedModel, student: PreTrainedModel, rows: Sequence[Sequence[int]], prompts: Sequence[int], length: int
) -> float:
    """Mean over rows of the errors of steps 1 … length; a response that has ended adds nothing."""
    total = 0.0
    for row, prompt in zip(rows, prompts, strict=True):
        for step in range(1, min(length, len(row) - prompt) + 1):
            total += step_error(teacher, student, row[: prompt + step - 1])
    return total / len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_equals_the_definition(
    family: str, sequences: tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]]
) -> None:
    teacher, student = FAMILIES[family](layers=3), FAMILIES[family](layers=2, width=24, seed=1)
    own, oracle, prompts = sequences
    found = measure(teacher, student, own, oracle, prompts)
    assert (found.lengths, found.rows) == (LENGTHS, 8)
    for index, length in enumerate(LENGTHS):
        regret, on_oracle = (accumulated(teacher, student, rows, prompts, length) for rows in (own, oracle))
        assert found.regret[index] == pytest.approx(regret, rel=2e-5)
        assert found.oracle_error[index] == pytest.approx(on_oracle / length, rel=2e-5)
        expected = (regret - length * (on_oracle / length)) / (length * (on_oracle / length)) * 100
        assert found.excess_percent[index] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        for alive, rows in ((found.student_alive, own), (found.oracle_alive, oracle)):
            assert alive[index] == sum(len(row) - prompt >= length for row, prompt in zip(rows, prompts, strict=True)) / 8
    # The first step is on the bare prompt, the same for both; later the two differ.
    assert found.excess_percent[0] == pytest.approx(0, abs=1e-4) and abs(found.excess_percent[-1]) > 1


def test_the_divergence_is_from_the_teacher_to_the_student(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    one, other = models
    there, back = (measure(p, q, [(5, 6, 7)], [(5, 6, 7)], [1], [2]) for p, q in ((one, other), (other, one)))
    assert there.regret[0] == pytest.approx(step_error(one, other, (5,)) + step_error(one, other, (5, 6)), rel=1e-5)
    assert back.regret[0] != pytest.approx(there.regret[0], rel=1e-3)


def test_equal_prefixes_show_no_bias(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    rows = [(1, 2, 3, 4, 5), (6, 7, 8)]
    found = measure(*models, rows, rows, [2, 1], [1, 2, 3])
    assert found.excess_percent == (0, 0, 0) and found.student_alive == found.oracle_alive
    assert all(error > 0 for error in found.oracle_error)


def test_a_student_that_errs_only_on_its_own_prefixes_has_a_bias() -> None:
    """The student differs from the teacher only after token 9, which the oracle never writes; after it, at every step."""
    teacher, student = tiny.llama(layers=2), tiny.llama(layers=2)
    student.model.embed_tokens.weight.data = student.model.embed_tokens.weight.data.clone()
    student.lm_head = torch.nn.Linear(32, 300, bias=False)
    student.lm_head.weight.data = teacher.lm_head.weight.data.clone()
    student.config.tie_word_embeddings = False
    student.model.embed_tokens.weight.data[9] += 3.0
    found = measure(teacher, student, [(1, 2, 9, 4, 5)], [(1, 2, 3, 4, 5)], [1], [1, 2, 3, 4])
    # No error at all on the oracle's prefixes: the ratio does not exist, the regret does.
    assert found.oracle_error == (0, 0, 0, 0) and found.excess_percent == (None,) * 4
    assert found.regret[:2] == (0, 0) and 0 < found.regret[2] < found.regret[3]


def test_rows_that_have_all_ended_add_nothing_more(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    own, oracle = [(1, 2, 0), (3, 0)], [(1, 5, 6, 0), (3, 7, 0)]
    found = measure(*models, own, oracle, [1, 1], [1, 2, 3, 4, 100])
    assert found.student_alive == (1, 0.5, 0, 0, 0) and found.oracle_alive == (1, 1, 0.5, 0, 0)
    assert found.regret[1] == found.regret[2] == found.regret[4]
    assert found.oracle_error[4] * 100 == pytest.approx(found.oracle_error[2] * 3)
    assert found.excess_percent[2:] == (pytest.approx(found.excess_percent[2]),) * 3


def test_one_token_is_one_step_on_the_bare_prompt(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = measure(*models, [(4, 5, 0)], [(4, 5, 17)], [2], [1])
    assert found.regret[0] == pytest.approx(step_error(*models, (4, 5)), rel=1e-5)
    assert found.excess_percent == (0,)


def test_what_lies_beyond_the_longest_length_is_not_looked_at(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    long = tuple(range(1, 40))
    longest: list[int] = []
    models[0].model.register_forward_pre_hook(
        lambda module, args, kwargs: longest.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    lenses = [logit_lens(model) for model in models]
    longest.clear()
    found = excess_accumulated_error(models[0], lenses[0], models[1], lenses[1], [long], [long], [2], [3], 1, 0)
    assert found.student_alive == (1,) and longest == [4, 4]


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 1), (2, 5), (8, None), (100, 3)])
def test_batches_and_chunks_change_nothing(
    models: tuple[PreTrainedModel, PreTrainedModel],
    sequences: tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]],
    batch_size: int,
    chunk_tokens: int | None,
) -> None:
    expected = measure(*models, *sequences)
    found = measure(*models, *sequences, batch_size=batch_size, chunk_tokens=chunk_tokens)
    assert found.regret == pytest.approx(expected.regret, rel=1e-5)
    assert found.oracle_error == pytest.approx(expected.oracle_error, rel=1e-5)
    assert found.student_alive == expected.student_alive


def test_only_a_chunk_of_logits_is_made_at_a_time(
    models: tuple[PreTrainedModel, PreTrainedModel],
    sequences: tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]],
    logit_rows: list[int],
) -> None:
    lenses = [logit_lens(model) for model in models]
    for model in models:
        model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("a model made all of its logits"))
    logit_rows.clear()  # a lens tries its head
    own, oracle, prompts = sequences
    excess_accumulated_error(
        models[0], lenses[0], models[1], lenses[1], own, oracle, prompts, [14], 8, 0, chunk_tokens=4
    )  # fmt: skip
    steps = sum(len(row) - prompt for rows in (own, oracle) for row, prompt in zip(rows, prompts, strict=True))
    assert max(logit_rows) == 4 and sum(logit_rows) == 2 * steps


def test_padded_heads_are_compared_on_the_prefix() -> None:
    teacher, student = tiny.llama(layers=2, vocab=320), tiny.llama(layers=2, vocab=304, seed=1)
    rows = [(1, 2, 3, 4)]
    found = measure(teacher, student, rows, rows, [1], [3], vocab_size=300)
    for model in (teacher, student):
        model.resize_token_embeddings(300)
    assert found.regret == pytest.approx(measure(teacher, student, rows, rows, [1], [3]).regret, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": []}, "0 student sequences, 2 oracle sequences and 2 prompt lengths"),
        ({"own": [], "oracle": [], "prompts": []}, "at least one"),
        ({"prompts": [1]}, "2 student sequences, 2 oracle sequences and 1 prompt lengths"),
        ({"own": [(1, 2, 3), (5, 8, 3)]}, "row 1: .* different prompts"),
        ({"own": [(1, 2, 3), (4, 8)]}, "example 1: 2 prompt tokens of 2"),
        ({"lengths": []}, r"lengths are \[\]"),
        ({"lengths": [0, 3]}, r"lengths are \[0, 3\]"),
        ({"lengths": [3, 3]}, r"lengths are \[3, 3\]"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    models: tuple[PreTrainedModel, PreTrainedModel], change: dict[str, object], message: str
) -> None:
    given: dict[str, object] = {"own": [(1, 2, 3), (4, 8, 6)], "oracle": [(1, 2), (4, 8, 7)], "prompts": [1, 2], "lengths": [2]}
    with pytest.raises(ValueError, match=message):
        measure(*models, **{**given, **change})  # type: ignore[arg-type]


def test_unfit_models_are_refused(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    rows = [(1, 2, 3)]
    with pytest.raises(ValueError, match="compares 304 vocabulary entries, the teacher's 300"):
        measure(models[0], tiny.llama(vocab=304), rows, rows, [1])
    for model in models:
        model.train()
        with pytest.raises(ValueError, match="training mode"):
            measure(*models, rows, rows, [1])
        model.eval()


@pytest.mark.parametrize("diverged", [0, 1])
def test_a_model_that_has_diverged_is_an_error(models: tuple[PreTrainedModel, PreTrainedModel], diverged: int) -> None:
    lenses = [logit_lens(model) for model in models]
    models[diverged].model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite numbers"):
        excess_accumulated_error(models[0], lenses[0], models[1], lenses[1], [(1, 2)], [(1, 3)], [1], [1], 1, 0)


def test_progress_counts_the_sequences_of_both(
    models: tuple[PreTrainedModel, PreTrainedModel],
    sequences: tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]],
) -> None:
    told, lenses = list[int](), [logit_lens(model) for model in models]
    excess_accumulated_error(models[0], lenses[0], models[1], lenses[1], *sequences, [2], 3, 0, progress=told.append)
    assert told == [3, 3, 2, 3, 3, 2]
