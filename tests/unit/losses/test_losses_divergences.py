"""Divergences: mathematical properties, extreme logits, composition."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.divergences import (
    DIVERGENCES,
    LOG_ZERO,
    adaptive_kl,
    divergence_of_logits,
    fkl_rkl_terms,
    forward_kl,
    forward_kl_terms,
    get_divergence,
    jeffreys,
    jensen_shannon,
    jensen_shannon_terms,
    log_probs,
    reverse_kl,
    reverse_kl_terms,
    weighted_sum_terms,
)

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "jensen_shannon_0.1": partial(jensen_shannon, beta=0.1),
    "jensen_shannon_0.9": partial(jensen_shannon, beta=0.9),
    "adaptive_kl": adaptive_kl,
    "jeffreys": jeffreys,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
seeds = st.integers(0, 10_000)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of probabilities, straight from the formula."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def plain_jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": partial(plain_jensen_shannon, beta=0.5),
    "jensen_shannon_0.1": partial(plain_jensen_shannon, beta=0.1),
    "jensen_shannon_0.9": partial(plain_jensen_shannon, beta=0.9),
    "jeffreys": lambda p, q: kl(p, q) + kl(q, p),
}


def value_and_gradient(function: Callable[[Tensor, Tensor], Tensor], teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = function(teacher, student)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, vocab=st.integers(2, 200), spread=st.floats(0.1, 8.0))
def test_equals_the_formula_on_probabilities(name: str, seed: int, vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(3, vocab, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    value, gradient = value_and_gradient(FUNCTIONS[name], teacher, student)
    expected, expected_gradient = value_and_gradient(lambda t, s: PLAIN[name](t.softmax(-1), s.softmax(-1)), teacher, student)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", PLAIN)
def test_gradcheck(name: str) -> None:
    teacher, student = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: FUNCTIONS[name](teacher, s), (student,))


@every_function
def test_zero_with_zero_gradient_at_equality(name: str) -> None:
    logits = torch.randn(5, 300, dtype=torch.float64) * 4
    value, gradient = value_and_gradient(FUNCTIONS[name], logits, logits)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-14)


@every_function
@settings(deadline=None, max_examples=20)
@given(seed=seeds, spread=st.floats(0.1, 50.0))
def test_never_negative_and_blind_to_a_constant(name: str, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(4, 50, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    value = FUNCTIONS[name](teacher, student)
    assert bool((value >= 0).all())
    torch.testing.assert_close(FUNCTIONS[name](teacher + 7.0, student - 3.0), value)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, spread=st.floats(0.1, 1e4))
def test_jensen_shannon_is_symmetric_and_at_most_log_2(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(4, 50, generator=generator) * spread for _ in range(2))
    value = jensen_shannon(p, q)
    torch.testing.assert_close(value, jensen_shannon(q, p), rtol=1e-5, atol=1e-6)
    assert bool((value >= -1e-6).all()) and bool((value <= math.log(2) + 1e-6).all())


def test_jensen_shannon_of_disjoint_distributions_is_log_2() -> None:
    p, q = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([math.log(2)]))


def test_beta_is_the_teachers_weight() -> None:
    p, q = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    mixture = torch.tensor([0.1 * 1.0 + 0.9 * 0.5, 0.9 * 0.5])
    expected = 0.1 * math.log(1 / mixture[0]) + 0.9 * (0.5 * torch.log(0.5 / mixture)).sum()
    torch.testing.assert_close(jensen_shannon(p, q, beta=0.1)[0], expected)


def test_jensen_shannon_keeps_its_digits_over_a_large_vocabulary() -> None:
    teacher, student = torch.randn(4, 49_152) * 3, torch.randn(4, 49_152) * 3
    value, gradient = value_and_gradient(jensen_shannon, teacher, student)
    expected, expected_gradient = value_and_gradient(jensen_shannon, teacher.double(), student.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-4


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    teacher = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 1e4]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, 1e4], [0.0, 0.0, 1e4]], dtype=dtype)
    value, gradient = value_and_gradient(FUNCTIONS[name], teacher, student)
    assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())
    assert abs(value[2]) <= torch.finfo(dtype).eps


@every_function
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_minus_infinity_stays_finite(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(6, 20, generator=generator) for _ in range(2))
    for logits in (teacher, student):
        mask = torch.rand(6, 20, generator=generator) < 0.4
        mask[:, 0] = False
        logits.masked_fill_(mask, -math.inf)
    value, gradient = value_and_gradient(FUNCTIONS[name], teacher, student)
    assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())


@every_function
def test_entries_that_both_exclude_change_nothing(name: str) -> None:
    teacher, student = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    excluded = torch.full((3, 4), -math.inf, dtype=torch.float64)
    value, gradient = value_and_gradient(FUNCTIONS[name], torch.cat([teacher, excluded], 1), torch.cat([student, excluded], 1))
    expected, expected_gradient = value_and_gradient(FUNCTIONS[name], teacher, student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :10], expected_gradient)
    assert bool((gradient[:, 10:] == 0).all())


@pytest.mark.parametrize(("name", "excluding"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_infinite_terms_are_left_out_of_value_and_gradient(name: str, excluding: str) -> None:
    logits = {"teacher": torch.randn(1, 6, dtype=torch.float64), "student": torch.randn(1, 6, dtype=torch.float64)}
    logits[excluding][0, 2] = -math.inf
    kept = torch.tensor([0, 1, 3, 4, 5])

    def plain(t: Tensor, s: Tensor) -> Tensor:
        log_p, log_q = t.log_softmax(-1)[:, kept], s.log_softmax(-1)[:, kept]
        first, second = (log_p, log_q) if name == "forward_kl" else (log_q, log_p)
        return (first.exp() * (first - second)).sum(-1)

    value, gradient = value_and_gradient(FUNCTIONS[name], logits["teacher"], logits["student"])
    expected, expected_gradient = value_and_gradient(plain, logits["teacher"], logits["student"])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_adaptive_kl_weighs_the_side_with_the_larger_gap() -> None:
    # Teacher (0.6, 0.2, 0.2): at mu = 0.5 the head is the first entry alone (0.6 > mu, but the first always belongs to it).
    p, q = torch.tensor([[0.6, 0.2, 0.2]]), torch.tensor([[0.3, 0.3, 0.4]])
    head_share = 0.3 / 0.6
    expected = head_share * kl(p, q) + (1 - head_share) * kl(q, p)
    torch.testing.assert_close(adaptive_kl(p.log(), q.log()), expected)
    # At mu = 0.85 the second entry joins it.
    head_share = 0.4 / 0.6
    torch.testing.assert_close(adaptive_kl(p.log(), q.log(), mu=0.85), head_share * kl(p, q) + (1 - head_share) * kl(q, p))


def test_a_sum_is_a_divergence() -> None:
    teacher, student = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    mixed = weighted_sum_terms((0.3, forward_kl_terms), (2.0, jensen_shannon_terms(0.2)))
    value, gradient = value_and_gradient(partial(divergence_of_logits, mixed), teacher, student)
    forward, forward_gradient = value_and_gradient(forward_kl, teacher, student)
    jsd, jsd_gradient = value_and_gradient(partial(jensen_shannon, beta=0.2), teacher, student)
    torch.testing.assert_close(value, 0.3 * forward + 2.0 * jsd)
    torch.testing.assert_close(gradient, 0.3 * forward_gradient + 2.0 * jsd_gradient)


def test_fkl_rkl_weights() -> None:
    teacher, student = torch.randn(3, 9), torch.randn(3, 9)
    expected = 0.25 * forward_kl(teacher, student) + 3.0 * reverse_kl(teacher, student)
    torch.testing.assert_close(divergence_of_logits(fkl_rkl_terms(0.25, 3.0), teacher, student), expected)
    torch.testing.assert_close(divergence_of_logits(DIVERGENCES["fkl_rkl"], teacher, student), jeffreys(teacher, student))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_arguments_stay_unchanged(name: str) -> None:
    log_p, log_q = log_probs(torch.randn(3, 9)), log_probs(torch.randn(3, 9))
    before = log_p.clone(), log_q.clone()
    DIVERGENCES[name](log_p, log_q)
    assert torch.equal(log_p, before[0]) and torch.equal(log_q, before[1])


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, student = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    reverse_kl(teacher, student).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_half_precision_is_widened() -> None:
    teacher, student = torch.randn(3, 50).bfloat16(), torch.randn(3, 50).bfloat16()
    value = forward_kl(teacher, student)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, forward_kl(teacher.float(), student.float()))


def test_log_zero_is_exactly_no_probability() -> None:
    assert torch.tensor(LOG_ZERO).exp() == 0.0
    assert log_probs(torch.tensor([0.0, -math.inf])).tolist() == [0.0, torch.tensor(LOG_ZERO).item()]


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match="0 < beta < 1"):
        jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), beta=beta)


def test_mu_out_of_range() -> None:
    with pytest.raises(ValueError, match="0 < mu < 1"):
        adaptive_kl(torch.zeros(1, 2), torch.zeros(1, 2), mu=1.0)


def test_different_shapes() -> None:
    with pytest.raises(ValueError, match="common vocabulary prefix"):
        forward_kl(torch.zeros(1, 2), torch.zeros(1, 3))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'forwardkl'; known: .*forward_kl"):
        get_divergence("forwardkl")
    assert get_divergence(reverse_kl_terms) is reverse_kl_terms


def test_empty_sum() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum_terms()
