"""The compiled elementwise part gives the eager values, and its absence is no failure."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.losses import elementwise
from pipeline.losses.divergences import reverse_kl_terms
from pipeline.losses.elementwise import DivergenceKernel, LogitShape, divergence_rows
from pipeline.losses.fused import vocab_divergence
from pipeline.losses.head import Head

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def run(
    backend: str,
    divergence: str,
    rows: int,
    weights: torch.Tensor | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    torch.manual_seed(1)
    hidden, weight = (torch.randn(size, 8, dtype=dtype, requires_grad=True) for size in (rows, 300))
    teacher = Head(torch.randn(300, 6, dtype=dtype), softcap=softcap)
    loss = vocab_divergence(
        hidden,
        Head(weight, softcap=softcap),
        torch.randn(rows, 6, dtype=dtype),
        teacher,
        divergence=divergence,
        chunk_tokens=40,
        weights=weights,
        backend=backend,  # type: ignore[arg-type]
    )
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@needs_compiler
@pytest.mark.parametrize(
    ("divergence", "weighted", "softcap", "dtype", "tolerance"),
    [
        ("jensen_shannon", False, None, torch.float32, 1e-6),
        ("jensen_shannon", False, None, torch.float64, 1e-13),
        ("reverse_kl", True, 5.0, torch.float32, 1e-6),
        ("adaptive_kl", False, None, torch.float32, 1e-6),
    ],
)
def test_compiled_equals_eager(
    divergence: str,
    weighted: bool,
    softcap: float | None,
    dtype: torch.dtype,
    tolerance: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # 75 rows in chunks of 40: whole blocks of 16 and remainders.
    weights = torch.rand(75) if weighted else None
    with caplog.at_level(logging.INFO, logger=elementwise.__name__):
        compiled = run("compiled", divergence, 75, weights, softcap, dtype)
    assert not caplog.records
    for one, other in zip(compiled, run("eager", divergence, 75, weights, softcap, dtype), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@needs_compiler
def test_one_compilation_serves_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = []
    original = elementwise._trace_and_compile

    def counted(kernel: DivergenceKernel, examples: list[torch.Tensor]) -> object:
        compilations.append(examples[0].shape)
        return original(kernel, examples)

    monkeypatch.setattr(elementwise, "_trace_and_compile", counted)
    elementwise._compile.cache_clear()
    for rows in (16, 75, 33, 200):
        run("compiled", "forward_kl", rows)
    assert compilations == [torch.Size([16, 300])]


def test_eager_never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_compile", None)
    run("eager", "reverse_kl", 40)


def test_the_environment_can_switch_compilation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(elementwise.NO_COMPILE_VARIABLE, "1")
    monkeypatch.setattr(elementwise, "_compile", None)
    switched_off = run("compiled", "reverse_kl", 40)
    assert all(torch.equal(one, other) for one, other in zip(switched_off, run("eager", "reverse_kl", 40), strict=True))


WITHOUT_COMPILER = """
import logging, torch
from pipeline.losses.fused import vocab_divergence
from pipeline.losses.head import Head

logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
states, head = torch.randn(40, 4), Head(torch.randn(30, 4))
losses = [
    vocab_divergence(states, head, -states, head, divergence="reverse_kl", backend=backend)
    for backend in ("compiled", "compiled", "eager")
]
assert losses[0] == losses[1] == losses[2], losses
"""


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop(elementwise.NO_COMPILE_VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("pipeline.losses.elementwise INFO")]
    assert len(ours) == 1 and "runs eagerly" in ours[0]


def test_rows_do_not_depend_on_their_block() -> None:
    plain = LogitShape(1.0, None)
    kernel = DivergenceKernel(reverse_kl_terms, plain, plain, with_grad=False)
    student, teacher = torch.randn(9, 70_000), torch.randn(9, 70_000)
    one_by_one = [divergence_rows(kernel, student[[row]], teacher[[row]], None, "eager") for row in range(9)]
    torch.testing.assert_close(divergence_rows(kernel, student, teacher, None, "eager"), torch.cat(one_by_one))
