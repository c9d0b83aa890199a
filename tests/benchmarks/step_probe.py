"""Whole training steps in a process of their own, so that the peak memory is theirs alone.

    PYTHONPATH=tests python tests/benchmarks/step_probe.py pair TEACHER ROWS …   plain and ours alternate, times
    PYTHONPATH=tests python tests/benchmarks/step_probe.py plain|ours …          one side, peak memory

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from plain_step import plain_loss, plain_step
from rows import encode_training, read_examples
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.data.sources import LocalSource
from pipeline.losses.elementwise import Backend
from pipeline.losses.objective import LensTerm, Objective
from pipeline.models.layers import uniform_pairs
from pipeline.models.lens import logit_lens
from pipeline.models.load import load_model, load_tokenizer
from pipeline.models.student import prune
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.device import flush_denormals, peak_memory_gib, reset_peak_memory
from pipeline.training.optim import adamw
from pipeline.training.step import Student, Teacher, micro_batch_loss, optimizer_step

STUDENT_LAYERS, PADDED, CPU = 12, 512, torch.device("cpu")


def models(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(teacher of 30 layers, student of 12): the student lacks layers 10 to 27."""
    teacher = load_model(folder).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    student, _ = prune(teacher, 9, len(teacher.model.layers) - STUDENT_LAYERS)
    return teacher, student.train()


def examples(folder: Path, data: Path, count: int) -> list[EncodedExample]:
    """The first rows of the file, encoded as training does."""
    rows = read_examples(LocalSource(data, count + count // 4))
    return encode_training(rows, load_tokenizer(folder), "alpaca")[0][:count]


def batches(rows: Sequence[EncodedExample], size: int, pad_to: int | None = None) -> list[Batch]:
    """Rows sorted by length in batches of `size`, as an epoch's bucket holds them."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return [collate(ordered[at : at + size], 0, pad_to) for at in range(0, len(ordered), size)]


def our_step(student: PreTrainedModel, teacher: PreTrainedModel, backend: Backend) -> Callable[[Batch], float]:
    """A step of the pipeline on one batch."""
    objective = _objective(teacher)
    source = Teacher(OnlineTeacher(teacher), logit_lens(teacher))
    trained = Student(student, logit_lens(student))
    optimizer = adamw(trained.modules, 1e-6, 0.01, (0.9, 0.999))

    def step(batch: Batch) -> float:
        return optimizer_step(
            trained, source, objective, [batch], optimizer, max_grad_norm=1.0, autocast=None, backend=backend
        )["loss"]

    return step


def reference_step(student: PreTrainedModel, teacher: PreTrainedModel) -> Callable[[Batch], float]:
    """The plain step on one batch."""
    pairs = _pairs(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    return lambda batch: plain_step(student, teacher, batch, pairs, optimizer)


def deviation(teacher: PreTrainedModel, student: PreTrainedModel, row: EncodedExample, backend: Backend) -> dict[str, float]:
    """How far our and the plain float32 gradient on one row are from the plain one in float64, relative, and both losses."""
    ours = _loss_and_gradient(student, lambda: our_loss(student, teacher, collate([row], 0), backend))
    pairs = _pairs(teacher)
    plain = _loss_and_gradient(student, lambda: plain_loss(student, teacher, collate([row], 0, PADDED), pairs))
    wide_student, wide_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    exact = _loss_and_gradient(wide_student, lambda: plain_loss(wide_student, wide_teacher, collate([row], 0), pairs))
    return {
        "loss_deviation": abs(ours[0] / exact[0] - 1),
        "plain_loss_deviation": abs(plain[0] / exact[0] - 1),
        "gradient_deviation": _distance(ours[1], exact[1]),
        "plain_gradient_deviation": _distance(plain[1], exact[1]),
    }


def our_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, backend: Backend) -> Tensor:
    """The pipeline's loss of one batch."""
    return micro_batch_loss(
        Student(student, logit_lens(student)), Teacher(OnlineTeacher(teacher), logit_lens(teacher)), _objective(teacher), batch,
        denominator=sum(batch.response_counts), autocast=None, backend=backend,
    ).total  # fmt: skip


def _loss_and_gradient(student: PreTrainedModel, loss: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
    value = loss()
    return float(value.detach()), list(torch.autograd.grad(value, list(student.parameters())))


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    squares = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in zip(found, exact, strict=True)]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


def _pairs(teacher: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    return uniform_pairs(5, STUDENT_LAYERS, len(teacher.model.layers), "bench")


def _objective(teacher: PreTrainedModel) -> Objective:
    return Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", _pairs(teacher), False, "aligned"))


def seconds(step: Callable[[Batch], float], batch: Batch) -> float:
    started = time.perf_counter()
    step(batch)
    return time.perf_counter() - started


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    teacher, student = models(arguments.teacher)
    rows = examples(arguments.teacher, arguments.data, arguments.rows)
    ours = our_step(student, teacher, arguments.backend)
    own_batches = batches(rows, arguments.batch)
    if arguments.side == "pair":
        plain = reference_step(student, teacher)
        padded = batches(rows, 1, PADDED)
        found = deviation(teacher, student, rows[0], arguments.backend)
        ours(own_batches[0])
        # As many plain rows as our batches, spread over the lengths and alternating with them.
        chosen = [padded[at * len(padded) // len(own_batches)] for at in range(len(own_batches))]
        times = [(seconds(plain, row), seconds(ours, batch)) for row, batch in zip(chosen, own_batches, strict=True)]
        return {
            "plain_seconds_per_row": statistics.mean(a for a, _ in times),
            "seconds_per_row": sum(b for _, b in times) / len(rows),
            "rows": len(rows),
            "plain_rows": len(chosen),
            "response_tokens": sum(sum(batch.response_counts) for batch in own_batches),
            **found,
        }
    step = ours if arguments.side == "ours" else reference_step(student, teacher)
    work = own_batches if arguments.side == "ours" else batches(rows, arguments.batch, PADDED)
    reset_peak_memory(CPU)
    for batch in work:
        step(batch)
    return {"peak_gib": peak_memory_gib(CPU), "batch": arguments.batch}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["pair", "plain", "ours"])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backend", default="compiled")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    flush_denormals()
    print(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
