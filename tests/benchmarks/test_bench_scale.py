"""The cost model of `pipeline.scale`: its constants measured, and its predictions beside runs at three small sizes.

Other work on the machine slows constants and runs alike, so they alternate: every run is predicted from the constants measured
right before and right after it, and the reported ratio is the median over the repetitions. No constant comes from a run, and
no shape of the constants is one of the runs'.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Figures
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.divergences import get_divergence
from pipeline.losses.elementwise import DivergenceKernel, LogitShape, divergence_rows, keep_freed_blocks
from pipeline.losses.fused import default_chunk_tokens
from pipeline.losses.objective import LensTerm, Objective, teacher_layers
from pipeline.models.layers import uniform_pairs
from pipeline.models.lens import logit_lens
from pipeline.scale.costs import capture_seconds, step_seconds
from pipeline.scale.shapes import Case, Machine, Method, Shape, Workload, cache_bytes
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.device import flush_denormals
from pipeline.training.optim import adamw
from pipeline.training.step import Student, Teacher, optimizer_step

GROUP, CPU, REPEATS = "cost model, docs/scale.md", torch.device("cpu"), 7


def case(name: str, teacher: Shape, student: Shape, pairs: int, rows: int, tokens: int, response: int) -> Case:
    """One optimiser step of `rows` rows, as a workload."""
    method = Method("distilllens", task=True, pairs=pairs, cross_entropy=False)
    return Case(name, teacher, student, Workload(rows, tokens, response, 1, rows, rows, (method,)))


CASES = (
    case(
        "Llama 8 × 384 → 4 × 256, V 8,192",
        Shape(8, 384, 1024, 8192, 6, 6, tied=True, gated_mlp=True),
        Shape(4, 256, 768, 8192, 4, 4, tied=True, gated_mlp=True),
        pairs=3, rows=8, tokens=128, response=64,
    ),
    case(
        "GPT-2 16 × 512 → 8 × 384, V 16,384",
        Shape(16, 512, 2048, 16_384, 8, 8, tied=True, gated_mlp=False, biases=True, positions=256),
        Shape(8, 384, 1536, 16_384, 6, 6, tied=True, gated_mlp=False, biases=True, positions=256),
        pairs=5, rows=4, tokens=128, response=64,
    ),
    case(
        "Llama 24 × 576 → 12 × 576, V 49,152",
        Shape(24, 576, 1536, 49_152, 9, 3, tied=True, gated_mlp=True),
        Shape(12, 576, 1536, 49_152, 9, 3, tied=True, gated_mlp=True),
        pairs=5, rows=2, tokens=160, response=80,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Constants:
    """Seconds per FLOP, vocabulary entry and byte."""

    body: float
    lens: float
    entry: float
    activation: float
    memory: float

    def mean(self, other: Constants) -> Constants:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Constants(*((a + b) / 2 for a, b in pairs))

    def machine(self, disk_read: float, disk_write: float) -> Machine:
        return Machine(
            "here", body_flops=1 / self.body, float32_flops=1 / self.body, lens_flops=1 / self.lens, entries=1 / self.entry,
            activation_bandwidth=1 / self.activation, memory_bandwidth=1 / self.memory, memory=math.inf, devices=1,
            link=math.inf, disk=math.inf, disk_read=disk_read, disk_write=disk_write, network=math.inf, half=False,
        )  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Probes:
    """Small fixed pieces of work, one for each constant of the model."""

    def __init__(self) -> None:
        keep_freed_blocks()
        rows, width, ffn, vocab = 1024, 448, 1280, 32_768
        self._body = (torch.randn(rows, width), torch.randn(ffn, width), torch.randn(rows, ffn), torch.randn(width, width))
        self._body_flops = 3 * 2 * rows * width * (ffn + width)
        chunk, width = default_chunk_tokens(vocab), 448
        self._hidden, self._head = torch.randn(chunk, width), torch.randn(vocab, width) / 16
        self._logits, self._other = torch.empty(chunk, vocab), torch.empty(chunk, vocab)
        self._grad_hidden, self._grad_head = torch.empty(chunk, width), torch.zeros(vocab, width)
        self._lens_flops = 8 * chunk * width * vocab
        shape = LogitShape(1.0, None)
        self._kernel = DivergenceKernel(get_divergence("jensen_shannon"), shape, shape, with_grad=True)
        self._small = (torch.randn(1024, 1024), torch.randn(1024, 1024))
        self._large = (torch.randn(2**25), torch.randn(2**25))

    def _products(self) -> None:
        hidden, inner, grad, square = self._body
        torch.mm(hidden, inner.t()), torch.mm(grad, inner), torch.mm(grad.t(), hidden)
        torch.mm(hidden, square.t()), torch.mm(hidden, square), torch.mm(hidden.t(), hidden)

    def _lens(self) -> None:
        torch.mm(self._hidden, self._head.t(), out=self._logits)
        torch.mm(self._hidden, self._head.t(), out=self._other)
        torch.mm(self._logits, self._head, out=self._grad_hidden)
        self._grad_head.addmm_(self._logits.t(), self._hidden)

    def _entries(self) -> None:
        divergence_rows(self._kernel, self._logits, self._other, None, "eager")

    def measure(self) -> Constants:
        small, large = self._small, self._large
        lens = seconds(self._lens)
        # The products leave logits of the same rows; the kernel overwrites them, so it comes right after.
        entries = seconds(self._entries)
        return Constants(
            body=seconds(lambda: [self._products() for _ in range(6)]) / (6 * self._body_flops),
            lens=lens / self._lens_flops,
            entry=entries / self._logits.numel(),
            activation=seconds(lambda: [torch.mul(*small) for _ in range(40)]) / (40 * 12 * small[0].numel()),
            memory=seconds(lambda: large[0].add_(large[1])) / (12 * large[0].numel()),
        )


def disk_rates(folder: Path, mebibytes: int = 256) -> tuple[float, float]:
    """(read, write) in bytes/s of one file, written through to the disk and read back with its pages dropped."""
    file, block = folder / "disk", os.urandom(2**20)

    def write() -> None:
        with file.open("wb", buffering=0) as stream:
            for _ in range(mebibytes):
                stream.write(block)
            os.fsync(stream.fileno())

    def read() -> None:
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**20):
                pass

    writing = seconds(write)
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = file.stat().st_size
    return size / seconds(read), size / writing


def build(shape: Shape) -> PreTrainedModel:
    """A random model of a shape."""
    if shape.gated_mlp:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab, n_embd=shape.width, n_inner=shape.ffn, n_layer=shape.layers, n_head=shape.heads,
            n_positions=shape.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


class Run:
    """The pipeline's own steps and capture at one of the sizes."""

    def __init__(self, case: Case, folder: Path) -> None:
        work, self._folder = case.workload, folder
        teacher, student = build(case.teacher).eval(), build(case.student).train()
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        pairs = uniform_pairs(work.methods[0].pairs, case.student.layers, case.teacher.layers, "bench")
        self._objective = Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", pairs, False, "aligned"))
        layers = teacher_layers(self._objective, case.teacher.layers)
        self._key = CacheKey("random", "none", "none", "random", layers, work.dtype, 512)
        self._rows = examples(case)
        self._batch: Batch = collate(self._rows, 0)
        self._model, self._student = teacher, Student(student, logit_lens(student))
        self._optimizer = adamw(self._student.modules, 1e-6, 0.01, (0.9, 0.999))
        lens = logit_lens(teacher)
        self._online = Teacher(OnlineTeacher(teacher), lens)
        self.bytes = self.capture("first")
        source = CachedTeacher(folder / "first", self._key, num_layers=case.teacher.layers, device=CPU)
        self._cached = Teacher(source, lens)
        self.step(online=True)

    def capture(self, name: str) -> int:
        """Bytes of a capture of the rows."""
        (self._folder / name).mkdir()
        return capture(
            self._model, self._rows, self._key.layers, self._folder / name, self._key,
            batch_size=len(self._rows), pad_token_id=0, device=CPU,
        ).bytes  # fmt: skip

    def step(self, *, online: bool) -> None:
        optimizer_step(
            self._student, self._online if online else self._cached, self._objective, [self._batch], self._optimizer,
            max_grad_norm=1.0, autocast=None,
        )  # fmt: skip


def examples(case: Case) -> list[EncodedExample]:
    """Rows of equal length: `tokens` input tokens, of which `response_tokens` predict the response."""
    work = case.workload
    generator = torch.Generator().manual_seed(0)
    shape = (work.rows, round(work.tokens) + 1)
    ids: Tensor = torch.randint(0, case.student.vocab, shape, generator=generator)
    prompt = shape[1] - round(work.response_tokens)
    return [EncodedExample(f"{index:016x}", tuple(row), prompt) for index, row in enumerate(ids.tolist())]


@dataclass(frozen=True)
class Checked:
    """One prediction: medians over the repetitions of seconds and of their quotients."""

    what: str
    predicted: float
    measured: float
    ratio: float


def check(case: Case, probes: Probes, disk: tuple[float, float], folder: Path) -> tuple[list[Checked], list[Constants]]:
    """Predictions and runs at one size, alternating with the constants."""
    flush_denormals()
    torch.manual_seed(0)
    run = Run(case, folder)
    method = case.workload.methods[0]
    work: dict[str, tuple[Callable[[int], Any], Callable[[Machine], float]]] = {
        "step, teacher online": (lambda _: run.step(online=True), lambda m: step_seconds(case, method, m, online=True)),
        "step, from the cache": (lambda _: run.step(online=False), lambda m: step_seconds(case, method, m, online=False)),
        "capture": (lambda repeat: run.capture(f"capture {repeat}"), lambda m: capture_seconds(case, m)),
    }
    probes.measure()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    constants = [probes.measure()]
    for repeat in range(REPEATS):
        for name, (carry_out, predict) in work.items():
            took = seconds(lambda carry_out=carry_out, repeat=repeat: carry_out(repeat))  # type: ignore[misc]
            constants.append(probes.measure())
            found[name].append((predict(constants[-2].mean(constants[-1]).machine(*disk)), took))
    checked = [
        Checked(name, *(statistics.median(column) for column in zip(*times, strict=True)), ratio=statistics.median(
            predicted / measured for predicted, measured in times
        ))
        for name, times in found.items()
    ]  # fmt: skip
    size = cache_bytes(case)
    return [*checked, Checked("cache, bytes", size, run.bytes, size / run.bytes)], constants


@pytest.fixture(scope="module")
def probes() -> Probes:
    return Probes()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    rates = [disk_rates(tmp_path_factory.mktemp("disk")) for _ in range(3)]
    return statistics.median(read for read, _ in rates), statistics.median(write for _, write in rates)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prediction(
    benchmark: Any, figures: Figures, probes: Probes, disk: tuple[float, float], tmp_path: Path, case: Case
) -> None:
    checked, constants = benchmark.pedantic(check, args=(case, probes, disk, tmp_path), rounds=1)
    for found in checked:
        unit = "bytes" if "bytes" in found.what else "s"
        figures.add(GROUP, f"{case.name}: {found.what}, measured", found.measured, unit)
        figures.add(GROUP, f"{case.name}: {found.what}, predicted", found.predicted, unit)
        figures.add(GROUP, f"{case.name}: {found.what}, predicted over measured", found.ratio, "×")
    worst = max(abs(found.ratio - 1) for found in checked)
    figures.add(GROUP, f"{case.name}: largest error of a prediction, relative to the measurement", worst, "", ("<=", 0.25))
    for field in dataclasses.fields(Constants):
        rate = 1 / statistics.median(getattr(each, field.name) for each in constants)
        unit = {"body": "FLOP/s", "lens": "FLOP/s", "entry": "entries/s"}.get(field.name, "bytes/s")
        figures.add(GROUP, f"{case.name}: constant {field.name}", rate, unit)


def test_disk(benchmark: Any, figures: Figures, disk: tuple[float, float]) -> None:
    for name, rate in zip(("read", "write"), benchmark.pedantic(lambda: disk, rounds=1), strict=True):
        figures.add(GROUP, f"disk, {name}", rate, "bytes/s")
