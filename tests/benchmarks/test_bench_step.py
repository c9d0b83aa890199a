"""Whole DistillLens steps: against a plain implementation, at the paper's full size, and with a share of the lens tokens."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import step_probe
import torch
from conftest import Figures
from step_probe import STUDENT_LAYERS, examples, models

from pipeline.data.collate import Batch
from pipeline.losses.elementwise import Backend
from pipeline.losses.objective import LensTerm, Objective
from pipeline.models.layers import uniform_pairs
from pipeline.models.lens import logit_lens
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.device import flush_denormals
from pipeline.training.step import Student, Teacher, micro_batch_loss

HERE = Path(__file__).resolve().parent
STEP, XL, FRACTION = "one step, 12-layer student, SmolLM2 teacher, 5 pairs", "GPT-2 XL → GPT-2, 4 × 512", "lens.token_fraction"


def probe(script: str, *arguments: str) -> dict[str, Any]:
    """Run a probe in a process of its own and read its line of JSON."""
    project = HERE.parent.parent
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(HERE.parent)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_rows_per_second(benchmark: Any, figures: Figures, smollm: Path, dolly: Path, backend: Backend) -> None:
    common = ("--teacher", str(smollm), "--data", str(dolly), "--backend", backend)
    found = benchmark.pedantic(probe, args=("step_probe.py", "pair", *common), rounds=1)
    ratio = found["plain_seconds_per_row"] / found["seconds_per_row"]
    figures.add(STEP, f"plain, rows padded to 512, {found['plain_rows']} rows", found["plain_seconds_per_row"], "s/row")
    figures.add(STEP, f"ours, {backend}, batch 8, {found['rows']} rows", found["seconds_per_row"], "s/row")
    figures.add(STEP, f"rows per second over plain, {backend}", ratio, "×", (">=", 10))
    for name in ("loss", "gradient"):
        figures.add(STEP, f"{name}, distance from float64, {backend}", found[f"{name}_deviation"], "relative", ("<=", 1e-5))
        figures.add(STEP, f"{name}, distance of the plain float32", found[f"plain_{name}_deviation"], "relative")


@pytest.mark.timeout(3600)
def test_peak_memory(benchmark: Any, figures: Figures, smollm: Path, dolly: Path) -> None:
    common = ("--teacher", str(smollm), "--data", str(dolly))

    def measure() -> dict[tuple[str, int], float]:
        sides = [("plain", 1, 2), ("plain", 2, 2), ("ours", 1, 32), ("ours", 2, 32), ("ours", 8, 32), ("ours", 16, 32)]
        return {
            (side, batch): probe("step_probe.py", side, *common, "--batch", str(batch), "--rows", str(rows))["peak_gib"]
            for side, batch, rows in sides
        }

    peaks = benchmark.pedantic(measure, rounds=1)
    for (side, batch), peak in peaks.items():
        goal = ("<=", 8.0) if (side, batch) == ("ours", 16) else None
        figures.add(STEP, f"peak of the process, {side}, batch {batch}", peak, "GiB", goal)
    for batch in (1, 2):
        figures.add(STEP, f"peak over plain, batch {batch}", peaks["ours", batch] / peaks["plain", batch], "×", ("<=", 1 / 3))


@pytest.mark.timeout(3600)
def test_the_papers_full_size(benchmark: Any, figures: Figures, tmp_path: Path) -> None:
    def measure() -> dict[str, dict[str, Any]]:
        return {side: probe("xl_probe.py", side, str(tmp_path)) for side in ("prepare", "online", "cached")}

    found = benchmark.pedantic(measure, rounds=1)
    for side, what in (("online", "teacher's forward pass included"), ("cached", "from a bfloat16 cache")):
        figures.add(XL, f"one step, {what}", found[side]["seconds"], "s")
        figures.add(XL, f"peak of the process, {what}", found[side]["peak_gib"], "GiB", ("<=", 14.0))
    figures.add(XL, "capture of the 4 rows", found["prepare"]["capture_seconds"], "s")
    figures.add(
        XL, "loss from the cache over online, minus 1", found["cached"]["loss"] / found["online"]["loss"] - 1, "relative"
    )


@pytest.mark.timeout(3600)
def test_token_fraction(benchmark: Any, figures: Figures, smollm: Path, dolly: Path) -> None:
    """A step's time, and how far the lens term's gradient strays from the full one, root mean square over draws."""
    flush_denormals()
    teacher, student = models(smollm)
    batch = step_probe.batches(examples(smollm, dolly, 8), 8)[0]
    step_time, _ = gradients(student, teacher, batch, "reverse_kl", 1.0, draws=2)
    _, (full, *_) = gradients(student, teacher, batch, None, 1.0, draws=1)
    squared_length = sum(float(part.square().sum()) for part in full)
    for fraction in (0.5, 0.25, 0.1):
        time_each, _ = gradients(student, teacher, batch, "reverse_kl", fraction, draws=2)
        _, found = gradients(student, teacher, batch, None, fraction, draws=6)
        errors = [
            sum(float((part - exact).square().sum()) for part, exact in zip(gradient, full, strict=True)) / squared_length
            for gradient in found
        ]
        deviation = statistics.mean(errors) ** 0.5
        figures.add(FRACTION, f"{fraction:g}: time of forward and backward over that of 1", time_each / step_time, "×")
        figures.add(FRACTION, f"{fraction:g}: deviation of the lens gradient, one step of 8 rows", deviation, "relative")
    benchmark.pedantic(gradients, args=(student, teacher, batch, "reverse_kl", 0.25, 1), rounds=1)


def gradients(
    student: Any, teacher: Any, batch: Batch, task: str | None, fraction: float, draws: int
) -> tuple[float, list[list[torch.Tensor]]]:
    """Seconds of one forward and backward pass, and the gradients of `draws` token draws."""
    lens = LensTerm(1.0, "jensen_shannon", uniform_pairs(5, STUDENT_LAYERS, 30, "bench"), False, "aligned", fraction)
    trained, source = Student(student, logit_lens(student)), Teacher(OnlineTeacher(teacher), logit_lens(teacher))

    def gradient(draw: int) -> list[torch.Tensor]:
        loss = micro_batch_loss(
            trained, source, Objective(1.0, task, lens=lens), batch, denominator=sum(batch.response_counts),
            autocast=None, backend="compiled", draw=draw,
        ).total  # fmt: skip
        return list(torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True))

    gradient(-1)  # compilation and page faults do not count
    started = time.perf_counter()
    found = [gradient(draw) for draw in range(draws)]
    return (time.perf_counter() - started) / draws, found
