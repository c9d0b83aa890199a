"""The teacher cache on real rows: capture beside the bare forward pass, bytes, an epoch's time, and what each dtype changes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Figures
from step_probe import batches, examples, models
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.objective import LensTerm, Objective, teacher_layers
from pipeline.models.layers import uniform_pairs
from pipeline.models.lens import load_lens, logit_lens
from pipeline.models.load import load_model
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import STORAGE, CacheKey
from pipeline.teacher.cache.writer import CaptureCounts, capture
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.device import flush_denormals
from pipeline.training.optim import adamw
from pipeline.training.step import Student, Teacher, micro_batch_loss, optimizer_step

GROUP, BATCH, ROWS, CPU = "teacher cache, SmolLM2, dolly rows, 6 layers", 8, 32, torch.device("cpu")
OBJECTIVE = Objective(
    1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", uniform_pairs(5, 12, 30, "bench"), False, "aligned")
)
LAYERS = teacher_layers(OBJECTIVE, 30)


def make_key(dtype: str) -> CacheKey:
    return CacheKey("smollm2", "smollm2", "dolly", "alpaca", LAYERS, dtype, 512)


def fill(folder: Path, model: PreTrainedModel, rows: list[EncodedExample], dtype: str) -> CaptureCounts:
    folder.mkdir()
    return capture(
        model, rows, LAYERS, folder, make_key(dtype), shard_bytes=16 << 20, batch_size=BATCH, pad_token_id=0, device=CPU
    )


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def forward(model: PreTrainedModel, parts: list[Batch]) -> None:
    with torch.no_grad():
        for batch in parts:
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", STORAGE)
def test_capture_beside_the_bare_forward_pass(
    benchmark: Any, figures: Figures, smollm: Path, dolly: Path, tmp_path: Path, dtype: str
) -> None:
    """Both run over the batches that capture forms and alternate; the share is the median over the repetitions."""
    model, rows = load_model(smollm).eval(), examples(smollm, dolly, 24)
    ordered = sorted(rows, key=lambda row: (-len(row.input_ids), row.id))
    parts = [collate(ordered[at : at + BATCH], 0) for at in range(0, len(ordered), BATCH)]
    forward(model, parts[:1])
    counts: list[CaptureCounts] = []

    def measure(repeat: int) -> float:
        bare = seconds(lambda: forward(model, parts))
        return bare / seconds(lambda: counts.append(fill(tmp_path / f"{dtype}{repeat}", model, rows, dtype)))

    share = statistics.median(measure(repeat) for repeat in range(3))
    figures.add(GROUP, f"capture's throughput over the bare forward pass, {dtype}", share, "×", (">=", 0.9))
    figures.add(GROUP, f"bytes per response token, {dtype}", counts[0].bytes / counts[0].response_tokens, "bytes")
    benchmark.pedantic(forward, args=(model, parts[:1]), rounds=1)


@pytest.mark.timeout(1800)
def test_an_epoch_online_and_cached(benchmark: Any, figures: Figures, smollm: Path, dolly: Path, tmp_path: Path) -> None:
    """Steps of the same batches with either source alternate."""
    flush_denormals()
    teacher, student = models(smollm)
    rows = examples(smollm, dolly, ROWS)
    fill(tmp_path / "cache", teacher, rows, "bfloat16")
    lens = logit_lens(teacher)
    sources = {
        "online": Teacher(OnlineTeacher(teacher), lens),
        "cached": Teacher(CachedTeacher(tmp_path / "cache", make_key("bfloat16"), num_layers=30, device=CPU), lens),
    }
    trained = Student(student, logit_lens(student))
    optimizer = adamw(trained.modules, 1e-6, 0.01, (0.9, 0.999))

    def step(source: Teacher, batch: Batch) -> None:
        optimizer_step(trained, source, OBJECTIVE, [batch], optimizer, max_grad_norm=1.0, autocast=None, backend="compiled")

    parts = batches(rows, BATCH)
    step(sources["online"], parts[0])
    spent = {name: 0.0 for name in sources}
    for batch in parts:
        for name, source in sources.items():
            spent[name] += seconds(lambda source=source, batch=batch: step(source, batch))  # type: ignore[misc]
    for name, total in spent.items():
        figures.add(GROUP, f"an epoch of {ROWS} rows, {name}", total, "s")
    figures.add(GROUP, "an epoch, cached over online", spent["cached"] / spent["online"], "×")
    benchmark.pedantic(step, args=(sources["cached"], parts[0]), rounds=1)


@pytest.mark.timeout(1800)
def test_what_a_dtype_changes(benchmark: Any, figures: Figures, smollm: Path, dolly: Path, tmp_path: Path) -> None:
    """Loss and gradient of one batch of real rows from each cache, against those from float32."""
    flush_denormals()
    teacher, student = models(smollm)
    rows = examples(smollm, dolly, 16)
    batch = collate(rows[:BATCH], 0)
    lens = load_lens(smollm, CPU)

    def loss_and_gradient(dtype: str) -> tuple[float, Tensor]:
        fill(tmp_path / dtype, teacher, rows, dtype)
        source = Teacher(CachedTeacher(tmp_path / dtype, make_key(dtype), num_layers=30, device=CPU), lens)
        loss = micro_batch_loss(
            Student(student, logit_lens(student)), source, OBJECTIVE, batch, denominator=sum(batch.response_counts),
            autocast=None, backend="compiled",
        ).total  # fmt: skip
        gradient = torch.autograd.grad(loss, list(student.parameters()))
        return float(loss.detach()), torch.cat([part.flatten().double() for part in gradient])

    exact_loss, exact = loss_and_gradient("float32")
    for dtype in ("bfloat16", "float16", "int8"):
        loss, gradient = loss_and_gradient(dtype)
        cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0)
        figures.add(GROUP, f"loss over that of float32, minus 1, {dtype}", loss / exact_loss - 1, "relative")
        figures.add(GROUP, f"1 − cosine of the gradient with that of float32, {dtype}", 1 - float(cosine), "")
    benchmark.pedantic(lambda: sum(len(row.input_ids) for row in rows), rounds=1)
