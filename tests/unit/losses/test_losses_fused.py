"""The fused objective against the plain one: the same values and gradients, without the logits in memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses.divergences import DIVERGENCES, divergence_of_logits, get_divergence
from pipeline.losses.fused import default_chunk_tokens, vocab_cross_entropy, vocab_divergence
from pipeline.losses.head import Head

Case = tuple[Tensor, Head, Tensor, Head]


def make_case(
    rows: int,
    vocab: int = 23,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    padding: int = 0,
) -> Case:
    """Student and teacher of different widths, their heads padded differently; the student's side requires gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def head(width: int, extra: int) -> Head:
        size = vocab if padding else None
        return Head(random(vocab + extra, width), random(vocab + extra) if bias else None, scale, softcap, size)

    student, teacher = head(5, padding), head(7, 2 * padding)
    student.weight.requires_grad_()
    if student.bias is not None:
        student.bias.requires_grad_()
    return random(rows, 5).requires_grad_(), student, random(rows, 7), teacher


def plain_divergence(case: Case, divergence: str, weights: Tensor | None = None) -> Tensor:
    hidden, head, teacher_hidden, teacher_head = case
    nats = divergence_of_logits(get_divergence(divergence), teacher_head.logits(teacher_hidden), head.logits(hidden))
    return (nats if weights is None else nats * weights).sum() / len(hidden)


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None and leaf.requires_grad]
    return list(torch.autograd.grad(loss, leaves))


def widened(case: Case) -> Case:
    hidden, head, teacher_hidden, teacher_head = case

    def wide(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return (
        wide(hidden),
        replace(head, weight=wide(head.weight), bias=wide(head.bias)),
        wide(teacher_hidden),
        replace(teacher_head, weight=wide(teacher_head.weight), bias=wide(teacher_head.bias)),
    )


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Equal within `tolerance` of each tensor's largest entry."""
    for one, other in zip(actual, expected, strict=True):
        atol = tolerance * max(float(other.abs().max()), 1e-12)
        torch.testing.assert_close(one.double(), other.double(), rtol=0.0, atol=atol)


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 20),
        "vocab": st.integers(2, 60),
        "seed": st.integers(0, 10_000),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "bias": st.booleans(),
        "scale": st.sampled_from([1.0, 0.3]),
        "softcap": st.sampled_from([None, 4.0]),
        "padding": st.sampled_from([0, 3]),
    }
)


@settings(deadline=None, max_examples=60)
@given(case=cases, divergence=st.sampled_from(sorted(DIVERGENCES)), chunk=st.integers(1, 25), weighted=st.booleans())
def test_divergence_equals_the_plain_one(case: dict[str, Any], divergence: str, chunk: int, weighted: bool) -> None:
    built = make_case(**case)
    weights = torch.rand(case["rows"], dtype=case["dtype"]) if weighted else None
    loss = vocab_divergence(*built, divergence=divergence, chunk_tokens=chunk, weights=weights)
    reference = widened(built)
    expected = plain_divergence(reference, divergence, None if weights is None else weights.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert_same(gradients(loss, *built[:2]), gradients(expected, *reference[:2]), 1e-5)


@settings(deadline=None, max_examples=40)
@given(case=cases, chunk=st.integers(1, 25), weighted=st.booleans())
def test_cross_entropy_equals_the_plain_one(case: dict[str, Any], chunk: int, weighted: bool) -> None:
    built = make_case(**case)
    labels = torch.randint(0, case["vocab"], (case["rows"],))
    weights = torch.rand(case["rows"], dtype=case["dtype"]) if weighted else None
    loss = vocab_cross_entropy(*built[:2], labels, chunk_tokens=chunk, weights=weights)
    hidden, head, _, _ = widened(built)
    nats = cross_entropy(head.logits(hidden), labels, reduction="none")
    expected = (nats if weights is None else nats * weights.double()).sum() / len(labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert_same(gradients(loss, *built[:2]), gradients(expected, hidden, head), 1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_gradcheck(divergence: str) -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(5, vocab=6, bias=True, scale=0.7, softcap=3.0, padding=2)

    def loss(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = replace(head, weight=weight, bias=bias)
        return vocab_divergence(states, student, teacher_hidden, teacher_head, divergence=divergence, chunk_tokens=2)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_cross_entropy_gradcheck() -> None:
    hidden, head, _, _ = make_case(5, vocab=6, bias=True, softcap=3.0)
    labels = torch.tensor([0, 5, 2, 2, 1])

    def loss(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return vocab_cross_entropy(states, replace(head, weight=weight, bias=bias), labels, chunk_tokens=3)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_no_rows_give_a_differentiable_zero() -> None:
    case = make_case(0, bias=True)
    for loss in (
        vocab_divergence(*case, divergence="reverse_kl"),
        vocab_cross_entropy(*case[:2], torch.zeros(0, dtype=torch.long)),
    ):
        assert loss.item() == 0.0
        assert [float(grad.abs().sum()) for grad in gradients(loss, *case[:2])] == [0.0, 0.0, 0.0]


def test_padding_rows_of_the_head_get_no_gradient() -> None:
    case = make_case(4, padding=3, bias=True)
    _, weight, bias = gradients(vocab_divergence(*case, divergence="jensen_shannon"), *case[:2])
    assert bool((weight[23:] == 0).all()) and bool((bias[23:] == 0).all()) and bool((weight[:23] != 0).any())


def test_a_tied_weight_collects_both_gradients() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(6)
    tokens = torch.arange(6)

    def loss(fused: bool) -> Tensor:
        embedded = head.weight[tokens] * 0.5
        if fused:
            return vocab_divergence(embedded, head, teacher_hidden, teacher_head, divergence="reverse_kl", chunk_tokens=4)
        return plain_divergence((embedded, head, teacher_hidden, teacher_head), "reverse_kl")

    assert_same(list(torch.autograd.grad(loss(True), head.weight)), list(torch.autograd.grad(loss(False), head.weight)), 1e-10)


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(4)
    teacher_hidden.requires_grad_()
    teacher_head.weight.requires_grad_()
    vocab_divergence(hidden, head, teacher_hidden, teacher_head, divergence="jeffreys").backward()
    assert teacher_hidden.grad is None and teacher_head.weight.grad is None and hidden.grad is not None


class ProductShapes(TorchDispatchMode):
    """Records the shape of every matrix product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(result.shape))
        return result


def products(run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    with ProductShapes() as recorder:
        run()
    return recorder.shapes


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(4)
    logits, grad_hidden, grad_weight = (4, 23), (4, 5), (23, 5)

    def run() -> Tensor:
        return vocab_divergence(hidden, head, teacher_hidden, teacher_head, divergence="reverse_kl")

    assert products(run) == [logits, logits, grad_hidden, grad_weight]
    head.weight.requires_grad_(False)
    assert products(run) == [logits, logits, grad_hidden]
    with torch.no_grad():
        assert products(run) == [logits, logits]


def test_a_frozen_head_leaves_the_hidden_gradient_as_it_is() -> None:
    case = make_case(7)
    both = gradients(vocab_divergence(*case, divergence="reverse_kl"), *case[:2])
    case[1].weight.requires_grad_(False)
    assert_same(gradients(vocab_divergence(*case, divergence="reverse_kl"), *case[:2]), both[:1], 1e-12)


def test_a_kept_graph_can_be_run_again() -> None:
    case = make_case(4, bias=True)
    loss = vocab_divergence(*case, divergence="jensen_shannon") * 3.0
    leaves = (case[0], case[1].weight, case[1].bias)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves)
    assert_same(list(second), kept, 1e-15)
    assert_same(list(first), kept, 1e-15)


def test_infinite_bias_excludes_an_entry() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(6, bias=True, dtype=torch.float32)
    assert head.bias is not None and teacher_head.bias is not None
    with torch.no_grad():
        head.bias[2] = teacher_head.bias[2] = head.bias[5] = teacher_head.bias[9] = -math.inf
    for divergence in DIVERGENCES:
        loss = vocab_divergence(hidden, head, teacher_hidden, teacher_head, divergence=divergence)
        assert loss.isfinite()
        assert all(bool(grad.isfinite().all()) for grad in gradients(loss, hidden, head))


def test_huge_logits_stay_finite() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(6, dtype=torch.float32)
    for divergence in DIVERGENCES:
        student, teacher = hidden.detach() * 1e4, teacher_hidden * -1e4
        loss = vocab_divergence(student.requires_grad_(), head, teacher, teacher_head, divergence=divergence)
        assert loss.isfinite()
        assert all(bool(grad.isfinite().all()) for grad in gradients(loss, student, head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    case = make_case(40, dtype=dtype, bias=True)
    loss = vocab_divergence(*case, divergence="jensen_shannon", chunk_tokens=3)
    grads = gradients(loss, *case[:2])
    assert loss.dtype == torch.float32 and [grad.dtype for grad in grads] == [dtype] * 3
    reference = widened(case)
    expected = plain_divergence(reference, "jensen_shannon")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0.0)
    assert_same(grads, gradients(expected, *reference[:2]), 2e-2)


def test_autocast_keeps_the_inputs_dtype_in_the_gradients() -> None:
    case = make_case(40, dtype=torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_divergence(*case, divergence="reverse_kl", chunk_tokens=7)
    grads = gradients(loss, *case[:2])
    assert loss.dtype == torch.float32 and [grad.dtype for grad in grads] == [torch.float32] * 3
    exact = vocab_divergence(*case, divergence="reverse_kl")
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0.0)
    assert_same(grads, gradients(exact, *case[:2]), 3e-2)


def test_concatenated_pairs_give_the_mean_of_the_pairs() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(8)
    whole = vocab_divergence(hidden, head, teacher_hidden, teacher_head, divergence="jensen_shannon")
    halves = [
        vocab_divergence(hidden[rows], head, teacher_hidden[rows], teacher_head, divergence="jensen_shannon")
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


def test_vocabularies_must_agree() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(4, padding=3)
    with pytest.raises(ValueError, match="compares 23 vocabulary entries, the teacher's 29; set vocab_size"):
        vocab_divergence(hidden, head, teacher_hidden, replace(teacher_head, vocab_size=None), divergence="reverse_kl")


def test_wrong_shapes_are_named() -> None:
    hidden, head, teacher_hidden, teacher_head = make_case(4)
    with pytest.raises(ValueError, match="4 student rows but 3 teacher rows"):
        vocab_divergence(hidden, head, teacher_hidden[:3], teacher_head, divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"student hidden states are \[4, 5\]; expected \[N, 7\]"):
        vocab_divergence(hidden, teacher_head, teacher_hidden, teacher_head, divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"weights are \[3\]"):
        vocab_divergence(hidden, head, teacher_hidden, teacher_head, divergence="reverse_kl", weights=torch.ones(3))
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        vocab_divergence(hidden, head, teacher_hidden, teacher_head, divergence="reverse_kl", chunk_tokens=0)
    with pytest.raises(ValueError, match="vocab_size 99"):
        vocab_cross_entropy(hidden, replace(head, vocab_size=99), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("label", [-100, 23])
def test_labels_outside_the_vocabulary(label: int) -> None:
    hidden, head, _, _ = make_case(4)
    with pytest.raises(ValueError, match="allowed: 0 … 22"):
        vocab_cross_entropy(hidden, head, torch.tensor([0, 1, label, 2]))


@pytest.mark.parametrize("vocab", [100, 49_152, 50_257, 151_936, 256_000])
def test_default_chunks_stay_small(vocab: int) -> None:
    chunk = default_chunk_tokens(vocab)
    assert chunk >= 16 and chunk * vocab * 4 <= 48 * 2**20


PEAK_MEMORY = """
import torch
from pipeline.losses.fused import vocab_divergence
from pipeline.losses.head import Head

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def run(rows):
    hidden, teacher = torch.randn(rows, 32, requires_grad=True), torch.randn(rows, 32)
    student_head, teacher_head = Head(torch.randn(49_152, 32, requires_grad=True)), Head(torch.randn(49_152, 32))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    vocab_divergence(hidden, student_head, teacher, teacher_head, divergence="jensen_shannon").backward()
    gradients = hidden.grad.numel() * 4 + student_head.weight.grad.numel() * 4
    return (status("VmHWM") - before - gradients) / 2**20

run(16)
print(run(2048))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_beyond_inputs_and_gradients() -> None:
    # 2048 rows of logits alone would be 384 MiB.
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300
