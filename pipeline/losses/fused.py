"""Objectives in vocabulary space that never hold more than a chunk of logits.

A row's logits are V numbers, its hidden state d; at V = 49,152 the logits of a batch do not fit in memory, let alone several
copies of them. So rows are taken in chunks: two matrix products give student and teacher logits, an elementwise kernel
(`pipeline.losses.elementwise`) turns them into nats and the gradient in the student's logits, in place, and two products turn
that gradient into those of the hidden states and of the head. All of it happens in the forward pass; the backward pass only
multiplies by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.losses.divergences import Divergence, get_divergence
from pipeline.losses.elementwise import (
    Backend,
    CrossEntropyKernel,
    DivergenceKernel,
    LogitShape,
    cross_entropy_rows,
    divergence_rows,
    keep_freed_blocks,
    row_chunks,
    rows_of,
)
from pipeline.losses.head import Head, check_same_size

_CHUNK_BYTES = 48 * 2**20
_SLICE_ROWS = 4096


def vocab_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    divergence: str | Divergence,
    chunk_tokens: int | None = None,
    weights: Tensor | None = None,
    backend: Backend = "eager",
) -> Tensor:
    """Mean divergence between teacher and student in vocabulary space, each through its own head.

    Rows of several layer pairs can be concatenated: one call then does all pairs.

    Args:
        student_hidden: [N, d_S].
        student_head: the student's head; its weight and bias may require gradients.
        teacher_hidden: [N, d_T]; a constant.
        teacher_head: the teacher's head; a constant.
        divergence: a name of `DIVERGENCES` or a `Divergence`.
        chunk_tokens: rows at a time; None takes `default_chunk_tokens`.
        weights: [N] or None; constants. With weights the result is sum(weights · nats) / N.
        backend: how the elementwise part runs; "compiled" takes seconds at the first call with a new kind of head or
            divergence, and gives the same values.

    Returns:
        Scalar, nats: mean over the N rows (0 for N = 0), float32 or wider. Differentiable once, in `student_hidden` and
        the student head's weight and bias.

    Raises:
        ValueError: shapes do not fit, or the heads compare different vocabulary sizes.
    """
    _check_rows(student_hidden, student_head, weights, "student")
    _check_rows(teacher_hidden, teacher_head, weights, "teacher")
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{student_hidden.shape[0]} student rows but {teacher_hidden.shape[0]} teacher rows; they must pair up"
        )
    check_same_size(student_head, teacher_head)
    weights = None if weights is None else weights.detach().to(_wide(student_head.weight.dtype))
    needs = _Needs.of(student_hidden, student_head)
    kernel = DivergenceKernel(get_divergence(divergence), LogitShape.of(student_head), LogitShape.of(teacher_head), needs.any)
    chunk = _chunk_rows(chunk_tokens, student_hidden.shape[0], student_head.size)
    teacher = _Projection.of(teacher_hidden, teacher_head, chunk)

    def row_loss(rows: slice, student_raw: Tensor) -> Tensor:
        return divergence_rows(kernel, student_raw, teacher.logits(rows), rows_of(weights, rows), backend)

    return _mean_over_rows(row_loss, student_hidden, student_head, chunk, needs, weights)


def vocab_cross_entropy(
    student_hidden: Tensor,
    student_head: Head,
    labels: Tensor,
    *,
    chunk_tokens: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the student's head against labels, by the same mechanics as `vocab_divergence`.

    Args:
        student_hidden: [N, d].
        student_head: the student's head; its weight and bias may require gradients.
        labels: [N] integers in [0, V'); rows without a label are the caller's to leave out.
        chunk_tokens: rows at a time; None takes `default_chunk_tokens`.
        weights: [N] or None; constants. With weights the result is sum(weights · nats) / N.

    Returns:
        Scalar, nats: mean over the N rows (0 for N = 0), float32 or wider.

    Raises:
        ValueError: shapes do not fit or a label is outside the vocabulary.
    """
    _check_rows(student_hidden, student_head, weights, "student")
    if labels.shape != student_hidden.shape[:1]:
        raise ValueError(f"labels are {list(labels.shape)}; expected one per row, [{student_hidden.shape[0]}]")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < student_head.size:
        raise ValueError(
            f"labels span {int(labels.min())} … {int(labels.max())}; allowed: 0 … {student_head.size - 1}. "
            "Leave rows without a label out"
        )
    weights = None if weights is None else weights.detach().to(_wide(student_head.weight.dtype))
    needs = _Needs.of(student_hidden, student_head)
    kernel = CrossEntropyKernel(LogitShape.of(student_head), needs.any)
    chunk = _chunk_rows(chunk_tokens, student_hidden.shape[0], student_head.size)

    def row_loss(rows: slice, student_raw: Tensor) -> Tensor:
        return cross_entropy_rows(kernel, student_raw, labels[rows], rows_of(weights, rows))

    return _mean_over_rows(row_loss, student_hidden, student_head, chunk, needs, weights)


def default_chunk_tokens(vocab_size: int) -> int:
    """Rows at a time when the caller does not say: a power of two whose float32 logits take at most 48 MiB."""
    return max(16, 1 << max(0, (_CHUNK_BYTES // (4 * vocab_size)).bit_length() - 1))


_RowLoss = Callable[[slice, Tensor], Tensor]
"""(rows, raw student logits [n, V']) -> nats [n]; the logits become their gradient."""


@dataclass(frozen=True)
class _Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @staticmethod
    def of(hidden: Tensor, head: Head) -> _Needs:
        enabled = torch.is_grad_enabled()
        return _Needs(
            enabled and hidden.requires_grad,
            enabled and head.weight.requires_grad,
            enabled and head.bias is not None and head.bias.requires_grad,
        )

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class _Projection:
    """Hidden states and a head in the dtype that their product runs in, with a reused buffer for a chunk of logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    buffer: Tensor

    @staticmethod
    def of(hidden: Tensor, head: Head, chunk: int) -> _Projection:
        dtype = _product_dtype(head.weight)
        return _Projection(
            hidden.detach().to(dtype),
            head.weight.detach()[: head.size].to(dtype),
            None if head.bias is None else head.bias.detach()[: head.size].to(dtype),
            torch.empty(chunk, head.size, dtype=dtype, device=hidden.device),
        )

    def logits(self, rows: slice) -> Tensor:
        out = self.buffer[: rows.stop - rows.start]
        if self.bias is None:
            return torch.mm(self.hidden[rows], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.hidden[rows], self.weight.t(), out=out)


def _product_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mean_over_rows(
    row_loss: _RowLoss, hidden: Tensor, head: Head, chunk: int, needs: _Needs, weights: Tensor | None
) -> Tensor:
    plan = _Plan(row_loss, head, chunk, needs, weights)
    mean: Tensor = _ChunkedMean.apply(plan, hidden, head.weight, head.bias)  # type: ignore[no-untyped-call]
    return mean


@dataclass(frozen=True)
class _Plan:
    row_loss: _RowLoss
    head: Head
    chunk: int
    needs: _Needs
    weights: Tensor | None


@dataclass(frozen=True)
class _Grads:
    """Sums over rows, float32 or wider; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(needs: _Needs, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Grads:
        return _Grads(
            torch.empty_like(hidden, dtype=_product_dtype(weight), memory_format=torch.contiguous_format)
            if needs.hidden
            else None,
            torch.zeros_like(weight, dtype=_wide(weight.dtype), memory_format=torch.contiguous_format)
            if needs.weight
            else None,
            torch.zeros_like(bias, dtype=_wide(bias.dtype)) if needs.bias and bias is not None else None,
        )

    def add_chunk(self, rows: slice, grad_logits: Tensor, student: _Projection) -> None:
        if self.hidden is not None:
            torch.mm(grad_logits, student.weight, out=self.hidden[rows])
        if self.weight is not None:
            _add_outer(self.weight[: grad_logits.shape[1]], grad_logits, student.hidden[rows])
        if self.bias is not None:
            self.bias[: grad_logits.shape[1]] += grad_logits.sum(0, dtype=self.bias.dtype)


def _add_outer(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits^T hidden [V', d] to `total`."""
    if total.dtype == grad_logits.dtype:
        total.addmm_(grad_logits.t(), hidden)
        return
    # A half-precision product cannot be added to a float32 sum in one call: by slices, so that its result stays small.
    for start in range(0, total.shape[0], _SLICE_ROWS):
        entries = slice(start, start + _SLICE_ROWS)
        total[entries] += torch.mm(grad_logits[:, entries].t(), hidden)


class _ChunkedMean(torch.autograd.Function):
    """Mean over rows of a row loss; all gradients are computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = hidden.shape[0]
        keep_freed_blocks()
        student = _Projection.of(hidden, plan.head, plan.chunk)
        grads = _Grads.zeros(plan.needs, hidden, weight, bias)
        total = torch.zeros((), dtype=_wide(student.weight.dtype), device=hidden.device)
        for rows in row_chunks(0, count, plan.chunk):
            logits = student.logits(rows)
            nats = plan.row_loss(rows, logits)
            total += nats.sum() if plan.weights is None else torch.dot(nats, plan.weights[rows])
            if plan.needs.any:
                grads.add_chunk(rows, logits, student)
        ctx.count = max(count, 1)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        return total / max(count, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scale, in_place = grad_output / ctx.count, not _graph_is_kept()
        scaled = (
            None if grad is None else (grad.mul_(scale) if in_place else grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, *scaled)


def _graph_is_kept() -> bool:
    """Whether another backward pass may follow (retain_graph), so that the saved gradients have to stay as they are."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return query is None or bool(query())


def _chunk_rows(chunk_tokens: int | None, count: int, vocab_size: int) -> int:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; allowed: at least 1, or None for the measured default")
    return min(chunk_tokens or default_chunk_tokens(vocab_size), max(count, 1))


def _check_rows(hidden: Tensor, head: Head, weights: Tensor | None, who: str) -> None:
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"{who} hidden states are {list(hidden.shape)}; expected [N, {head.weight.shape[1]}] for its head")
    if not 1 <= head.size <= head.weight.shape[0]:
        raise ValueError(f"the {who}'s head has {head.weight.shape[0]} rows but vocab_size {head.size}")
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(f"weights are {list(weights.shape)}; expected one per row, [{hidden.shape[0]}]")
