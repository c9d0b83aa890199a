"""Divergences between a teacher's and a student's next-token distributions, in nats per position.

Every divergence is one small pure function, a `Divergence`: from log-probabilities to its value and the derivative of that
value with respect to the student's log-probabilities. The public functions on logits and the fused objective
(`pipeline.losses.fused`) both run on that one definition, so a new divergence is written once.

Conventions, the same everywhere: teacher p first, student q second; logits or log-probabilities `[..., V]` in, nats `[...]`
out; no mask, no weights, no temperature; the teacher is a constant (no gradient reaches it).

Entries of probability zero (a logit of -inf in either model): 0 · log 0 = 0, and an entry whose term would be infinite
(p > 0 = q in forward KL, q > 0 = p in reverse KL) takes no part in the sum, as in the official code, so values and
gradients are always finite. The Jensen-Shannon divergence is finite without that and counts every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

LOG_ZERO = -1e30
"""Stands for log 0, so that differences of log-probabilities stay finite; far below the logarithm of any other probability."""

Divergence: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log_p [..., V], log_q [..., V]) -> (nats [...], d nats / d log_q [..., V]).

Both are normalised, at least LOG_ZERO, and stay unchanged. The derivative treats the entries of log_q as free variables; the
normalisation is the caller's: d nats / d logits = g - softmax · sum(g).
"""


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V] of logits [..., V], at least LOG_ZERO; not differentiable."""
    shifted = logits - logits.amax(-1, keepdim=True)
    log_total = shifted.clamp(min=_negligible(logits)).exp_().sum(-1, keepdim=True).log_()
    return shifted.sub_(log_total).clamp_(min=LOG_ZERO)


def probs(log_probs: Tensor) -> Tensor:
    """Probabilities [..., V] of log-probabilities [..., V]; those below 1e-26 (float64: 1e-260) are exactly 0.

    exp() of what lies far below takes a processor a hundred times as long as any other, and the lens logits of middle layers
    spread over thousands of nats. What is left out of a sum over V terms is below 1e-20.
    """
    lowest = _negligible(log_probs)
    return torch.nn.functional.threshold(log_probs.clamp(min=lowest).exp_(), 1.2 * math.exp(lowest), 0.0, inplace=True)


def _negligible(tensor: Tensor) -> float:
    return -600.0 if tensor.dtype == torch.float64 else -60.0


def _kl_terms(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """A and log(a / b), with a = 0 where the term a · log(a / b) is left out."""
    b_is_positive = (log_b - LOG_ZERO).clamp_(max=1.0)
    return probs(log_a).mul_(b_is_positive), log_a - log_b


def forward_kl_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p · log(p / q) and its derivative -p. A `Divergence`."""
    p, log_ratio = _kl_terms(log_p, log_q)
    return log_ratio.mul_(p).sum(-1), p.neg_()


def reverse_kl_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q · log(q / p) and its derivative q · (log(q / p) + 1). A `Divergence`."""
    q, log_ratio = _kl_terms(log_q, log_p)
    terms = log_ratio.mul_(q)
    return terms.sum(-1), q.add_(terms)


def jensen_shannon_terms(beta: float = 0.5) -> Divergence:
    """The generalised Jensen-Shannon divergence as a `Divergence`, see `jensen_shannon`.

    Raises:
        ValueError: beta is not strictly between 0 and 1.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta of the Jensen-Shannon divergence is {beta}; allowed: 0 < beta < 1 (it vanishes at both ends; "
            "for the limits use forward_kl or reverse_kl)"
        )

    offset, log_teacher_weight, log_student_weight = math.log((1.0 - beta) / beta), math.log(beta), math.log1p(-beta)

    def terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        # log m = logaddexp(log beta·p, log (1 - beta)·q), taken relative to its larger part: subtracting log m itself would
        # cost the last digits of logs of the size of log V.
        gap = log_q - log_p
        if offset != 0.0:
            gap = gap.add_(offset)
        # Below the clamp the term vanishes beside log 2; log1p of such numbers is as slow as exp of what underflows.
        above_larger = gap.abs().neg_().clamp_(min=-45.0 if gap.dtype == torch.float64 else -24.0).exp_().log1p_()
        log_student_share = gap.clamp(max=0.0).sub_(above_larger)
        log_teacher_share = torch.sub(log_student_share, gap, out=gap)
        teacher_part = log_teacher_share.sub_(log_teacher_weight).mul_(probs(log_p)).sum(-1)
        # The derivative through the mixture cancels the one of q · log q; what remains is the student's own term.
        student_part = log_student_share.sub_(log_student_weight).mul_(probs(log_q)).mul_(1.0 - beta)
        return student_part.sum(-1).add(teacher_part, alpha=beta), student_part

    return terms


def adaptive_kl_terms(mu: float = 0.5) -> Divergence:
    """The adaptive KL divergence as a `Divergence`, see `adaptive_kl`.

    Raises:
        ValueError: mu is not strictly between 0 and 1.
    """
    if not 0.0 < mu < 1.0:
        raise ValueError(
            f"mu of the adaptive KL divergence is {mu}; allowed: 0 < mu < 1 (share of the teacher's mass in the head)"
        )

    def terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        head_weight = _head_share_of_gap(probs(log_p), probs(log_q), mu)
        forward, forward_grad = forward_kl_terms(log_p, log_q)
        reverse, reverse_grad = reverse_kl_terms(log_p, log_q)
        return (
            torch.lerp(reverse, forward, head_weight),
            torch.lerp(reverse_grad, forward_grad, head_weight.unsqueeze(-1)),
        )

    return terms


def _head_share_of_gap(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Share [...] of sum |p - q| that lies on the teacher's head; 0.5 where p == q, where both KLs vanish."""
    sorted_p, order = p.sort(dim=-1, descending=True)
    is_tail = sorted_p.cumsum(-1) > mu
    is_tail[..., 0] = False
    gap = (sorted_p - q.gather(-1, order)).abs()
    head_gap, total = gap.masked_fill(is_tail, 0.0).sum(-1), gap.sum(-1)
    return torch.where(total > 0.0, head_gap / total, 0.5)


def weighted_sum_terms(*parts: tuple[float, Divergence]) -> Divergence:
    """The sum of weight · divergence over `parts`, itself a `Divergence`.

    Raises:
        ValueError: there are no parts.
    """
    if not parts:
        raise ValueError("a weighted sum of divergences needs at least one (weight, divergence) pair")

    def terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        evaluated = [(weight, *divergence(log_p, log_q)) for weight, divergence in parts]
        weight, value, grad = evaluated[0]
        value, grad = weight * value, weight * grad
        for weight, more_value, more_grad in evaluated[1:]:
            value, grad = value + weight * more_value, torch.add(grad, more_grad, alpha=weight)
        return value, grad

    return terms


def fkl_rkl_terms(forward_weight: float = 1.0, reverse_weight: float = 1.0) -> Divergence:
    """forward_weight · KL(p || q) + reverse_weight · KL(q || p) as a `Divergence`."""
    return weighted_sum_terms((forward_weight, forward_kl_terms), (reverse_weight, reverse_kl_terms))


def jeffreys_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) + KL(q || p) and its derivative. A `Divergence`."""
    forward, forward_grad = forward_kl_terms(log_p, log_q)
    reverse, reverse_grad = reverse_kl_terms(log_p, log_q)
    return forward + reverse, forward_grad + reverse_grad


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "forward_kl": forward_kl_terms,
        "reverse_kl": reverse_kl_terms,
        "jensen_shannon": jensen_shannon_terms(),
        "adaptive_kl": adaptive_kl_terms(),
        "jeffreys": jeffreys_terms,
        "fkl_rkl": fkl_rkl_terms(),
    }
)
"""Divergences by config name, at their default parameters; the factories above bind others."""


def get_divergence(divergence: str | Divergence) -> Divergence:
    """The `Divergence` of that name, or `divergence` itself.

    Raises:
        ValueError: no divergence has that name.
    """
    if not isinstance(divergence, str):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(sorted(DIVERGENCES))}")
    return DIVERGENCES[divergence]


class _NatsOfLogProbs(torch.autograd.Function):
    """A `Divergence` as a differentiable function of log_q, which may hold -inf."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
        value, grad = divergence(log_p, log_q.clamp(min=LOG_ZERO))
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_value: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, grad * grad_value.unsqueeze(-1), None


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`, half precision widened to float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def divergence_of_logits(divergence: Divergence, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Evaluate a `Divergence` on logits.

    Args:
        divergence: what to evaluate.
        teacher_logits: [..., V]; no gradient reaches them.
        student_logits: [..., V].

    Returns:
        Nats [...], float32 or wider, differentiable once in `student_logits`.

    Raises:
        ValueError: the shapes differ.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits {list(teacher_logits.shape)} and student logits {list(student_logits.shape)} differ in shape; "
            "compare the common vocabulary prefix"
        )
    log_p = log_probs(at_least_float32(teacher_logits.detach()))
    log_q = at_least_float32(student_logits).log_softmax(-1)
    nats: Tensor = _NatsOfLogProbs.apply(log_p, log_q, divergence)  # type: ignore[no-untyped-call]
    return nats


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Forward KL divergence KL(p || q) of logits [..., V]; nats [...], at least 0. Hinton et al. 2015 up to a constant."""
    return divergence_of_logits(forward_kl_terms, teacher_logits, student_logits)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Reverse KL divergence KL(q || p) of logits [..., V]; nats [...], at least 0. MiniLLM, Gu et al. 2024, Eq. 1."""
    return divergence_of_logits(reverse_kl_terms, teacher_logits, student_logits)


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, GKD (Agarwal et al. 2024), Eq. 1.

    beta · KL(p || m) + (1 - beta) · KL(q || m) with the mixture m = beta · p + (1 - beta) · q: beta is the *teacher's* weight,
    in the mixture and outside it, as in GKD, TRL and the official code. At beta = 0.5 symmetric and at most log 2.

    Args:
        teacher_logits: [..., V].
        student_logits: [..., V].
        beta: the teacher's weight, strictly between 0 and 1.

    Returns:
        Nats [...].

    Raises:
        ValueError: beta is out of range or the shapes differ.
    """
    return divergence_of_logits(jensen_shannon_terms(beta), teacher_logits, student_logits)


def adaptive_kl(teacher_logits: Tensor, student_logits: Tensor, mu: float = 0.5) -> Tensor:
    """Adaptive KL divergence (AKL), Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in KD for LLMs", Sec. 4.

    w · KL(p || q) + (1 - w) · KL(q || p), where w is the share of sum |p - q| that lies on the teacher's head: the most
    probable entries, in descending order, while their cumulative probability stays at or below mu (the first always belongs
    to it). As in the official code w is a constant for the gradient.

    Args:
        teacher_logits: [..., V].
        student_logits: [..., V].
        mu: the teacher's probability mass in the head, strictly between 0 and 1.

    Returns:
        Nats [...]; 0 with a zero gradient where the two are equal.

    Raises:
        ValueError: mu is out of range or the shapes differ.
    """
    return divergence_of_logits(adaptive_kl_terms(mu), teacher_logits, student_logits)


def jeffreys(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Jeffreys divergence KL(p || q) + KL(q || p) (the sum, not the mean) of logits [..., V]; nats [...], symmetric."""
    return divergence_of_logits(jeffreys_terms, teacher_logits, student_logits)
