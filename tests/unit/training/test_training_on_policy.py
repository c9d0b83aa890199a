"""On-policy mixing: which steps, what is sampled, and the gradient of a step on the student's own samples."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample, EncodedPrompt
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.generate import DecodingProtocol, generate
from pipeline.losses.objective import LensTerm, Objective
from pipeline.models.lens import logit_lens
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.on_policy import OnPolicy, is_on_policy, own_samples, sample_seed
from pipeline.training.step import Student, Teacher, optimizer_step

SAMPLING = DecodingProtocol(max_new_tokens=8, do_sample=True)
GREEDY = DecodingProtocol(max_new_tokens=8, do_sample=False)
END = 0
MODELS = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}
TOKENIZER = tiny.tokenizer()


def rows(count: int = 6) -> list[EncodedExample]:
    """Prompts of 2, 3, 4 … tokens, each with a response of its own."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(1, 300, (5 + 2 * index,), generator=generator).tolist()
        made.append(EncodedExample(f"e{index}", tuple(ids), 2 + index))
    return made


def sampled(
    model: PreTrainedModel,
    given: list[EncodedExample] | None = None,
    protocol: DecodingProtocol = SAMPLING,
    seed: int = 5,
    batch_size: int = 4,
    max_tokens: int = 64,
) -> list[EncodedExample]:
    return own_samples(model, TOKENIZER, rows() if given is None else given, protocol, seed, batch_size, max_tokens)


def eager_to_end(model: PreTrainedModel, bonus: float) -> PreTrainedModel:
    """The model with `bonus` added to the end token's logit."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features)
    bias[END] = bonus
    head.bias = torch.nn.Parameter(bias)
    return model


def test_the_share_of_on_policy_steps_is_the_fraction() -> None:
    steps = range(4000)
    for fraction in (0.1, 0.5, 0.9):
        share = sum(is_on_policy(7, step, fraction) for step in steps) / len(steps)
        # Six standard deviations of a binomial share.
        assert abs(share - fraction) < 6 * (fraction * (1 - fraction) / len(steps)) ** 0.5
    assert all(is_on_policy(7, step, 1.0) for step in steps)


def test_the_draw_belongs_to_seed_and_step() -> None:
    first = [is_on_policy(7, step, 0.5) for step in range(64)]
    torch.rand(3)
    assert [is_on_policy(7, step, 0.5) for step in range(64)] == first
    assert [is_on_policy(8, step, 0.5) for step in range(64)] != first
    assert all(is_on_policy(7, step, 0.7) for step in range(64) if first[step])


def test_every_step_and_seed_has_its_own_sampling_seed() -> None:
    assert len({sample_seed(seed, step) for seed in range(8) for step in range(200)}) == 1600
    assert sample_seed(3, 4) == sample_seed(3, 4)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        OnPolicy(fraction, SAMPLING, 1)
    assert OnPolicy(1.0, SAMPLING, 1).fraction == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_prompts_ids_and_order_are_kept_and_responses_replaced(name: str) -> None:
    given, own = rows(), sampled(MODELS[name]())
    for before, after in zip(given, own, strict=True):
        assert (after.id, after.prompt_tokens) == (before.id, before.prompt_tokens)
        assert after.input_ids[: after.prompt_tokens] == before.input_ids[: before.prompt_tokens]
        response = after.input_ids[after.prompt_tokens :]
        assert 1 <= len(response) <= 8 and END not in response[:-1]
        assert len(response) == 8 or response[-1] == END
    assert [row.input_ids for row in own] != [row.input_ids for row in given]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_samples_are_the_models_own_argmax(name: str) -> None:
    """One token after the other from whole forward passes, without cache or padding."""
    model = MODELS[name]()
    for row in sampled(model, protocol=GREEDY):
        ids = list(row.input_ids[: row.prompt_tokens])
        while len(ids) < row.prompt_tokens + 8 and (len(ids) == row.prompt_tokens or ids[-1] != END):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids) == row.input_ids


def test_samples_follow_the_protocol_of_evaluation() -> None:
    model = tiny.llama()
    protocol = DecodingProtocol(max_new_tokens=6, do_sample=True, temperature=0.7, top_p=0.8, no_repeat_ngram_size=2)
    prompts = [EncodedPrompt(row.id, "", row.input_ids[: row.prompt_tokens], ()) for row in rows()]
    expected = {g.id: g.token_ids for g in generate(model, TOKENIZER, prompts, protocol, [5], 4)}
    assert {row.id: row.input_ids[row.prompt_tokens :] for row in sampled(model, protocol=protocol)} == expected


@pytest.mark.parametrize("name", MODELS)
def test_samples_do_not_depend_on_how_rows_are_batched(name: str) -> None:
    model, given = MODELS[name](), rows()
    whole = sampled(model, given, batch_size=6)
    assert all(sampled(model, given, batch_size=size) == whole for size in (1, 2, 5, 64))
    assert sampled(model, given[:2]) + sampled(model, given[2:]) == whole
    assert sampled(model, given[::-1]) == whole[::-1]


def test_samples_are_reproducible_and_differ_between_seeds() -> None:
    model = tiny.llama()
    assert sampled(model, seed=sample_seed(1, 4)) == sampled(model, seed=sample_seed(1, 4))
    assert sampled(model, seed=sample_seed(1, 4)) != sampled(model, seed=sample_seed(1, 5))
    assert sampled(model, seed=sample_seed(1, 4)) != sampled(model, seed=sample_seed(2, 4))


def test_the_given_response_is_not_looked_at() -> None:
    model, given = tiny.llama(), rows()
    other = [EncodedExample(row.id, (*row.input_ids[: row.prompt_tokens], 9), row.prompt_tokens) for row in given]
    assert sampled(model, other) == sampled(model, given)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_no_trace(training: bool) -> None:
    expected = sampled(tiny.gpt2(dropout=0.5).eval())
    model = tiny.gpt2(dropout=0.5).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert sampled(model) == expected  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in model.modules()} == {training}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_training_random_numbers_are_those_of_a_run_without_sampling() -> None:
    def noisy_states(sample: bool) -> torch.Tensor:
        model = tiny.gpt2(dropout=0.5).train()
        torch.manual_seed(11)
        if sample:
            sampled(model)
        return model(torch.tensor([[4, 5, 6]])).logits

    assert torch.equal(noisy_states(True), noisy_states(False))


def test_a_model_that_ends_at_once_leaves_the_end_token() -> None:
    own = sampled(eager_to_end(tiny.llama(tie=False), 1e4))
    assert all(row.input_ids[row.prompt_tokens :] == (END,) for row in own)
    batch = collate(own, END)
    assert batch.response_counts == (1,) * len(own) and set(batch.response_labels.tolist()) == {END}


def test_the_end_token_is_kept_where_it_was_generated_and_not_added_elsewhere() -> None:
    own = sampled(eager_to_end(tiny.llama(tie=False), 4.0), rows(12))
    responses = [row.input_ids[row.prompt_tokens :] for row in own]
    ended = [response for response in responses if response[-1] == END]
    assert ended and len(ended) < len(responses)
    assert all(len(response) == 8 for response in responses if response[-1] != END)
    assert any(len(response) < 8 for response in ended)


def test_rows_keep_within_max_tokens() -> None:
    given = rows()
    own = sampled(tiny.llama(), given, max_tokens=9)
    assert max(len(row.input_ids) for row in own) == 9 < max(len(row.input_ids) for row in sampled(tiny.llama(), given))
    with pytest.raises(ConfigError, match="e5"):
        sampled(tiny.llama(), given, max_tokens=7)


def test_an_id_that_occurs_twice_is_refused() -> None:
    with pytest.raises(DataError, match="e0"):
        sampled(tiny.llama(), [rows()[0], rows()[0]])


PAIRS = ((1, 2), (2, 3), (3, 5))


def plain_loss(student: PreTrainedModel, teacher: PreTrainedModel, own: list[EncodedExample]) -> torch.Tensor:
    """Reverse KL on the final distributions plus the mean JSD of the pairs, row by row from whole logits."""
    total, tokens = torch.zeros(()), 0
    for row in own:
        ids = torch.tensor([row.input_ids[:-1]])
        first, last = row.prompt_tokens - 1, len(row.input_ids) - 1
        student_out = student(ids, output_hidden_states=True)
        with torch.no_grad():
            teacher_out = teacher(ids, output_hidden_states=True)
        p = teacher_out.logits[0, first:last].log_softmax(-1)
        q = student_out.logits[0, first:last].log_softmax(-1)
        total = total + (q.exp() * (q - p)).sum()
        for student_layer, teacher_layer in PAIRS:
            p = teacher.lm_head(teacher_out.hidden_states[teacher_layer][0, first:last]).softmax(-1).detach()
            q = student.lm_head(student_out.hidden_states[student_layer][0, first:last]).softmax(-1)
            middle = (p + q) / 2
            total = total + ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2 / len(PAIRS)
        tokens += last - first
    return total / tokens


@pytest.mark.parametrize("micro_batch_size", [1, 4, 6])
def test_the_gradient_of_a_step_on_own_samples(micro_batch_size: int) -> None:
    """DistillLens on the student's own samples, with the teacher's online states, against a plain re-derivation."""
    student, teacher = tiny.gpt2(layers=4, seed=7), tiny.gpt2(layers=6, seed=8)
    own = sampled(student.train())
    assert all(row.input_ids != given.input_ids for row, given in zip(own, rows(), strict=True))
    expected_loss = plain_loss(student, teacher, own)
    expected = torch.autograd.grad(expected_loss, list(student.parameters()))
    expected_loss = expected_loss.detach()
    start = [parameter.detach().clone() for parameter in student.parameters()]
    objective = Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, False, "aligned"))
    batches = [collate(own[at : at + micro_batch_size], END) for at in range(0, len(own), micro_batch_size)]
    losses = optimizer_step(
        Student(student, logit_lens(student)),
        Teacher(OnlineTeacher(teacher), logit_lens(teacher)),
        objective,
        batches,
        torch.optim.SGD(student.parameters(), lr=1.0),
        max_grad_norm=None,
        autocast=None,
    )
    assert losses["loss"] == pytest.approx(float(expected_loss), rel=1e-5)
    for before, parameter, gradient in zip(start, student.parameters(), expected, strict=True):
        assert torch.allclose(before - parameter, gradient, rtol=1e-4, atol=1e-6)
