"""What happens between the matrix products of the fused objective: from logits to nats and gradients, row by row.

A kernel takes a block of raw logits (W h + b, before scale and cap) and overwrites the student's with their gradient. Blocks
are small enough to stay in the processor's cache from one pass to the next; on that alone eager kernels come close to the
compiled ones. Compiled kernels are traced once for one fixed block shape, so nothing can recompile in mid-training; a
remainder smaller than a block runs eagerly. The compiler's cache on disk (TORCHINDUCTOR_CACHE_DIR) serves later runs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from pipeline.losses.divergences import LOG_ZERO, Divergence, at_least_float32, log_probs, probs
from pipeline.losses.head import Head

log = logging.getLogger(__name__)

Backend: TypeAlias = Literal["eager", "compiled"]
"""How the elementwise part runs. "compiled" needs a C++ compiler (CPU) or Triton (GPU) and falls back to "eager" without."""

NO_COMPILE_VARIABLE = "DISTILLLENS_NO_COMPILE"
"""Environment variable; any value but "" and "0" makes "compiled" mean "eager"."""

_COMPILED_BLOCK_ROWS = 16
_EAGER_BLOCK_BYTES = {"cpu": 3 * 2**18}
_EAGER_BLOCK_BYTES_ELSEWHERE = 2**26
_KEPT_BYTES = 31 * 2**20


@dataclass(frozen=True)
class LogitShape:
    """What a head does to its raw logits: cap(scale · z)."""

    scale: float
    softcap: float | None

    @staticmethod
    def of(head: Head) -> LogitShape:
        """The shaping of `head`."""
        return LogitShape(head.scale, head.softcap)

    def apply(self, raw: Tensor) -> Tensor:
        """Logits [..., V] of raw logits, float32 or wider."""
        logits = at_least_float32(raw)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def pull_back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient in the raw logits of a gradient in the logits; the cap's derivative is 1 - (logits / softcap)²."""
        if self.softcap is not None:
            grad = grad * (1.0 - (logits / self.softcap).square())
        return grad * self.scale if self.scale != 1.0 else grad


@dataclass(frozen=True)
class DivergenceKernel:
    """A divergence of a block of rows, and its gradient.

    Attributes:
        divergence: what to evaluate.
        student: scale and cap of the student's head.
        teacher: scale and cap of the teacher's head.
        with_grad: overwrite the student's logits with the gradient.
        float64_sums: take the sums over the vocabulary that nearly cancel in float64. The eager sum is pairwise and does not
            need it; the compiled one adds thousands of numbers in sequence, and compiled the wider sum costs next to nothing.
    """

    divergence: Divergence
    student: LogitShape
    teacher: LogitShape
    with_grad: bool
    float64_sums: bool = False

    def __call__(self, student_raw: Tensor, teacher_raw: Tensor, weights: Tensor | None) -> Tensor:
        """Nats [n] of raw logits [n, V]; with `with_grad`, `student_raw` becomes weights · d nats / d student_raw."""
        log_p = log_probs(self.teacher.apply(teacher_raw))
        logits = self.student.apply(student_raw)
        log_q = log_probs(logits)
        nats, grad = self.divergence(log_p, log_q)
        if self.with_grad:
            grad = self._through_softmax(grad, probs(log_q))
            if weights is not None:
                grad = grad * weights.unsqueeze(-1)
            student_raw.copy_(self.student.pull_back(grad, logits))
        return nats

    def _through_softmax(self, grad: Tensor, q: Tensor) -> Tensor:
        # In float32 the q of a large vocabulary sum to 1 + 1e-6; where the two terms nearly cancel that would show.
        dtype = torch.float64 if self.float64_sums else None
        mean = grad.sum(-1, keepdim=True, dtype=dtype) / q.sum(-1, keepdim=True, dtype=dtype)
        return torch.addcmul(grad, q, mean.to(q.dtype), value=-1.0)


@dataclass(frozen=True)
class CrossEntropyKernel:
    """Cross-entropy of a block of rows against labels, and its gradient."""

    student: LogitShape
    with_grad: bool

    def __call__(self, student_raw: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Nats [n] of raw logits [n, V] and labels [n]; with `with_grad`, `student_raw` becomes the weighted gradient."""
        logits = self.student.apply(student_raw)
        shifted = logits - logits.amax(-1, keepdim=True)
        at_label = labels.unsqueeze(-1)
        shifted_label = shifted.gather(-1, at_label).clamp_(min=LOG_ZERO)
        label, others = probs(shifted_label), probs(shifted).scatter_(-1, at_label, 0.0)
        # The label's own term stays apart: for a near-certain label q - 1 and log q would lose all digits but those of 1.
        rest = others.sum(-1, keepdim=True)
        total = rest + label
        nats = torch.where(shifted_label > -20.0, torch.log1p(rest / label), total.log() - shifted_label).squeeze(-1)
        if self.with_grad:
            grad = others.div_(total).scatter_(-1, at_label, -rest / total)
            if weights is not None:
                grad *= weights.unsqueeze(-1)
            student_raw.copy_(self.student.pull_back(grad, logits))
        return nats


def divergence_rows(
    kernel: DivergenceKernel, student_raw: Tensor, teacher_raw: Tensor, weights: Tensor | None, backend: Backend
) -> Tensor:
    """Nats [n] of raw logits [n, V], block by block; the student's logits become the gradient if the kernel has one."""
    nats = student_raw.new_empty(student_raw.shape[0], dtype=at_least_float32(student_raw[:0]).dtype)
    compiled = _compiled_for(kernel, student_raw, teacher_raw, weights) if backend == "compiled" else None
    done = 0
    if compiled is not None:
        done = nats.shape[0] - nats.shape[0] % _COMPILED_BLOCK_ROWS
        for rows in row_chunks(0, done, _COMPILED_BLOCK_ROWS):
            nats[rows] = compiled(student_raw[rows], teacher_raw[rows], rows_of(weights, rows))
    for rows in row_chunks(done, nats.shape[0], _eager_block_rows(student_raw)):
        nats[rows] = kernel(student_raw[rows], teacher_raw[rows], rows_of(weights, rows))
    return nats


def cross_entropy_rows(kernel: CrossEntropyKernel, student_raw: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Nats [n] of raw logits [n, V] against labels [n], block by block; as `divergence_rows`."""
    nats = student_raw.new_empty(student_raw.shape[0], dtype=at_least_float32(student_raw[:0]).dtype)
    for rows in row_chunks(0, nats.shape[0], _eager_block_rows(student_raw)):
        nats[rows] = kernel(student_raw[rows], labels[rows], rows_of(weights, rows))
    return nats


def row_chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover start … stop."""
    return (slice(begin, min(begin + size, stop)) for begin in range(start, stop, size))


def keep_freed_blocks() -> None:
    """Have the C library reuse the memory of freed blocks.

    glibc hands every freed block of over 128 KiB back to the system, and taking it again costs more than the arithmetic on
    it, until once a larger block has been freed: from then on it keeps up to twice that size (32 MiB is the most it heeds).
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


_RowKernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows of a tensor that may not be there."""
    return None if tensor is None else tensor[rows]


def _eager_block_rows(raw: Tensor) -> int:
    size = _EAGER_BLOCK_BYTES.get(raw.device.type, _EAGER_BLOCK_BYTES_ELSEWHERE)
    return max(1, size // (raw.shape[1] * max(4, raw.element_size())))


def _compiled_for(
    kernel: DivergenceKernel, student_raw: Tensor, teacher_raw: Tensor, weights: Tensor | None
) -> _RowKernel | None:
    if os.environ.get(NO_COMPILE_VARIABLE, "") not in ("", "0") or student_raw.shape[0] < _COMPILED_BLOCK_ROWS:
        return None
    weights_dtype = None if weights is None else weights.dtype
    return _compile(kernel, student_raw.shape[1], student_raw.dtype, teacher_raw.dtype, weights_dtype, student_raw.device)


@functools.cache
def _compile(
    kernel: DivergenceKernel,
    vocab_size: int,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    weights_dtype: torch.dtype | None,
    device: torch.device,
) -> _RowKernel | None:
    """The kernel compiled for blocks of one shape, or None (with one log line per kernel) where that does not work."""
    rows = _COMPILED_BLOCK_ROWS
    examples = [
        torch.zeros(rows, vocab_size, dtype=student_dtype, device=device),
        torch.zeros(rows, vocab_size, dtype=teacher_dtype, device=device),
    ]
    if weights_dtype is not None:
        examples.append(torch.ones(rows, dtype=weights_dtype, device=device))
    try:
        compiled = _trace_and_compile(replace(kernel, float64_sums=True), examples)
    except (RuntimeError, OSError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        log.info("the elementwise part of the objective runs eagerly, it cannot be compiled here: %s", reason)
        return None
    return compiled


def _trace_and_compile(kernel: DivergenceKernel, examples: list[Tensor]) -> _RowKernel:
    # Imported here: the compiler takes a second to import and most processes never need it.
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(student_raw: Tensor, teacher_raw: Tensor, *weights: Tensor) -> tuple[Tensor]:
        return (kernel(student_raw, teacher_raw, weights[0] if weights else None),)

    # A traced graph instead of torch.compile: it has no guards, so neither a check per call nor a recompilation.
    with torch.no_grad(), torch.autocast(examples[0].device.type, enabled=False):
        graph = make_fx(traced)(*examples)
        function = torch._inductor.compile(graph, list(examples))
        function(*examples)

    def run(student_raw: Tensor, teacher_raw: Tensor, weights: Tensor | None) -> Tensor:
        arguments = (student_raw, teacher_raw) if weights is None else (student_raw, teacher_raw, weights)
        return cast(Tensor, function(*arguments)[0])

    return run
