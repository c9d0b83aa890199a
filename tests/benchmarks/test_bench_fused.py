"""Time of the fused objective over that of its matrix products alone, and its peak memory.

The denominator is the four products of every row (student logits, teacher logits, gradients of
hidden states and of the head: 8 · d · V floating-point operations) with torch.mm into preallocated buffers of the same chunk
shapes. Numerator and denominator alternate within one run, the ratio is the median over the repetitions.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Figures

from pipeline.losses.elementwise import Backend
from pipeline.losses.fused import default_chunk_tokens, vocab_cross_entropy, vocab_divergence
from pipeline.losses.head import Head

VOCAB = 49_152


@dataclass(frozen=True)
class Sizes:
    """N rows, V vocabulary entries, widths of the hidden states."""

    rows: int
    vocab: int = VOCAB
    student_width: int = 576
    teacher_width: int = 576

    def __str__(self) -> str:
        return f"N {self.rows}, d {self.student_width}/{self.teacher_width}"


@dataclass(frozen=True)
class Ratio:
    """Seconds of the fused objective and of its products, and the median of their quotients."""

    fused: float
    products: float
    ratio: float


def products_only(sizes: Sizes, chunk: int) -> Callable[[], None]:
    """The four matrix products of every chunk, into preallocated buffers."""
    hidden, teacher_hidden = torch.randn(sizes.rows, sizes.student_width), torch.randn(sizes.rows, sizes.teacher_width)
    weight, teacher_weight = torch.randn(sizes.vocab, sizes.student_width), torch.randn(sizes.vocab, sizes.teacher_width)
    logits, teacher_logits = torch.empty(chunk, sizes.vocab), torch.empty(chunk, sizes.vocab)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def run() -> None:
        for start in range(0, sizes.rows, chunk):
            rows = slice(start, min(start + chunk, sizes.rows))
            size = rows.stop - start
            torch.mm(hidden[rows], weight.t(), out=logits[:size])
            torch.mm(teacher_hidden[rows], teacher_weight.t(), out=teacher_logits[:size])
            torch.mm(logits[:size], weight, out=grad_hidden[rows])
            grad_weight.addmm_(logits[:size].t(), hidden[rows])

    return run


def fused_step(sizes: Sizes, divergence: str, backend: Backend, chunk: int) -> Callable[[], None]:
    """Forward and backward pass of `vocab_divergence` on random states."""
    hidden = torch.randn(sizes.rows, sizes.student_width, requires_grad=True)
    teacher_hidden = torch.randn(sizes.rows, sizes.teacher_width)
    student = Head((torch.randn(sizes.vocab, sizes.student_width) / 16).requires_grad_())
    teacher = Head(torch.randn(sizes.vocab, sizes.teacher_width) / 16)

    def run() -> None:
        loss = vocab_divergence(
            hidden, student, teacher_hidden, teacher, divergence=divergence, chunk_tokens=chunk, backend=backend
        )
        torch.autograd.grad(loss, (hidden, student.weight))

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_ratio(sizes: Sizes, divergence: str, backend: Backend, chunk: int | None = None, repeats: int = 7) -> Ratio:
    """Fused objective over its products, alternating; the first pass of each (compilation, page faults) does not count."""
    chunk = chunk or default_chunk_tokens(sizes.vocab)
    products, fused = products_only(sizes, chunk), fused_step(sizes, divergence, backend, chunk)
    products()
    fused()
    pairs = [(seconds(products), seconds(fused)) for _ in range(repeats)]
    return Ratio(
        fused=statistics.median(b for _, b in pairs),
        products=statistics.median(a for a, _ in pairs),
        ratio=statistics.median(b / a for a, b in pairs),
    )


PEAK = """
import sys, torch
from pipeline.losses.fused import vocab_divergence
from pipeline.losses.head import Head
rows, vocab, width, backend = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def status(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

def run(rows):
    hidden, head = torch.randn(rows, width, requires_grad=True), Head(torch.randn(vocab, width, requires_grad=True))
    teacher, teacher_head = torch.randn(rows, width), Head(torch.randn(vocab, width))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    vocab_divergence(hidden, head, teacher, teacher_head, divergence="jensen_shannon", backend=backend).backward()
    return status("VmHWM") - before - (hidden.numel() + head.weight.numel()) * 4 / 2**20

run(32)
print(run(rows))
"""


def measure_peak_mib(sizes: Sizes, backend: Backend) -> float:
    """Peak resident memory beyond inputs and gradients, MiB, in a process of its own."""
    arguments = [str(sizes.rows), str(sizes.vocab), str(sizes.student_width), backend]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_cross_entropy(sizes: Sizes) -> float:
    """Seconds of a forward and backward pass of `vocab_cross_entropy` (6 · d · V floating-point operations a row)."""
    hidden = torch.randn(sizes.rows, sizes.student_width, requires_grad=True)
    head = Head((torch.randn(sizes.vocab, sizes.student_width) / 16).requires_grad_())
    labels = torch.randint(0, sizes.vocab, (sizes.rows,))

    def run() -> None:
        torch.autograd.grad(vocab_cross_entropy(hidden, head, labels), (hidden, head.weight))

    run()
    return statistics.median(seconds(run) for _ in range(3))


GROUP = "fused objective, V = 49,152"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("backend", "bound"), [("compiled", 1.35), ("eager", 1.8)])
@pytest.mark.parametrize("divergence", ["jensen_shannon", "reverse_kl"])
@pytest.mark.parametrize("sizes", [Sizes(1024), Sizes(2048), Sizes(2048, 49_152, 768, 1600)], ids=str)
def test_ratio_to_the_products(
    benchmark: Any, figures: Figures, divergence: str, backend: Backend, bound: float, sizes: Sizes
) -> None:
    ratio = benchmark.pedantic(measure_ratio, args=(sizes, divergence, backend), rounds=1)
    figures.add(GROUP, f"{divergence}, {backend}, {sizes}: time over its products", ratio.ratio, "×", ("<=", bound))


@pytest.mark.parametrize("backend", ["compiled", "eager"])
@pytest.mark.parametrize("rows", [2048, 8192])
def test_peak_memory(benchmark: Any, figures: Figures, backend: Backend, rows: int) -> None:
    peak = benchmark.pedantic(measure_peak_mib, args=(Sizes(rows), backend), rounds=1)
    figures.add(GROUP, f"peak beyond inputs and gradients, {backend}, {rows} rows", peak, "MiB", ("<=", 300))


def test_cross_entropy(benchmark: Any, figures: Figures) -> None:
    took = benchmark.pedantic(measure_cross_entropy, args=(Sizes(1024),), rounds=1)
    figures.add(GROUP, "cross-entropy, 1024 rows, forward and backward", took, "s")
