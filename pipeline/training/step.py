"""One optimiser step: micro-batches forward and backward, then clip and update."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.collate import Batch
from pipeline.losses import objective as losses
from pipeline.losses.elementwise import Backend
from pipeline.models.lens import LogitLens
from pipeline.teacher.signal import TeacherSignal, TeacherSource
from pipeline.training.optim import clip_gradients
from pipeline.training.sharded import whole
from pipeline.training.zero import ZeroOptimizer

if TYPE_CHECKING:
    from pipeline.training.replicas import Replica  # brings accelerate, which one process has no use for


@dataclass(frozen=True)
class Student:
    """What is trained.

    Attributes:
        model: the student.
        lens: its head and norm, live views of the model's parameters.
        projection: the learned projection of feature matching, if the method has one.
    """

    model: PreTrainedModel
    lens: LogitLens
    projection: nn.Linear | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """Every module with trained parameters."""
        return [self.model] if self.projection is None else [self.model, self.projection]


@dataclass(frozen=True)
class Teacher:
    """Who teaches: where the states come from, and the lens that turns them into distributions."""

    source: TeacherSource
    lens: LogitLens


def optimizer_step(
    student: Student,
    teacher: Teacher | None,
    objective: losses.Objective,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer | ZeroOptimizer,
    *,
    max_grad_norm: float | None,
    autocast: torch.dtype | None,
    backend: Backend = "eager",
    signals: Sequence[TeacherSignal] | None = None,
    draw: int = 0,
    replica: Replica | None = None,
) -> dict[str, float]:
    """Train on one batch, given as micro-batches; the result depends neither on how it is divided nor on the processes.

    Args:
        student: trained in place.
        teacher: needed by every method but SFT.
        objective: the method.
        micro_batches: the step's rows.
        optimizer: of the student's parameters.
        max_grad_norm: None leaves gradients as they are.
        autocast: dtype of the forward passes, None for the parameters' own.
        backend: how the divergences' elementwise part runs.
        signals: the teacher's states of each micro-batch where they were read ahead; None asks the teacher now.
        draw: names this step's random draws (`lens.token_fraction`).
        replica: the student as it is shared with other processes, of which this one has `micro_batches`; None has them all.

    Returns:
        "loss", "loss_<term>" for each term (nats, mean over the step's response tokens), "grad_norm" before clipping. With
        several processes the losses are this one's shares, whose sum is the mean; "grad_norm" is that of all.
    """
    tokens = sum(sum(batch.response_counts) for batch in micro_batches)
    denominator = tokens if replica is None else int(replica.group.sum([tokens])[0])
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):

        def loss(trained: Student, index: int = index, batch: Batch = batch) -> losses.Terms:
            return micro_batch_loss(
                trained,
                teacher,
                objective,
                batch,
                denominator=denominator,
                autocast=autocast,
                backend=backend,
                signal=None if signals is None else signals[index],
                draw=draw,
            )

        if replica is None:
            terms = loss(student)
            terms.total.backward()  # type: ignore[no-untyped-call]
        else:
            terms = replica.backward(loss, last=index == len(micro_batches) - 1)
        for name, value in {"loss": terms.total.detach(), **{f"loss_{k}": v for k, v in terms.parts.items()}}.items():
            totals[name] = totals[name] + value if name in totals else value
    if replica is None:
        assert isinstance(optimizer, torch.optim.Optimizer)  # ZeRO's belongs to a replica
        norm = update(student, optimizer, max_grad_norm)
    else:
        norm = replica.update()
    return {**{name: float(value) for name, value in totals.items()}, "grad_norm": float(norm)}


def update(student: Student, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Tensor:
    """Clip the gradients, step and clear them; returns their norm before clipping."""
    norm = whole(clip_gradients(student.modules, max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def micro_batch_loss(
    student: Student,
    teacher: Teacher | None,
    objective: losses.Objective,
    batch: Batch,
    *,
    denominator: int,
    autocast: torch.dtype | None,
    backend: Backend = "eager",
    signal: TeacherSignal | None = None,
    draw: int = 0,
) -> losses.Terms:
    """Forward pass of one micro-batch: the student's body once, the teacher's states, the terms. No full logits are made."""
    device = student.model.device.type
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        layers = losses.student_layers(objective, student.lens.num_layers)
        student_side = losses.Side(
            _student_states(student.model, batch, layers), student.lens.head, student.lens.norm, student.lens.num_layers
        )
        teacher_side = None
        if objective.needs_teacher and teacher is not None:
            signal = signal or teacher.source.signal(batch, losses.teacher_layers(objective, teacher.lens.num_layers))
            teacher_side = losses.Side(signal.states, teacher.lens.head, teacher.lens.norm, teacher.lens.num_layers)
        return losses.compute(
            objective,
            student_side,
            teacher_side,
            batch.labels,
            denominator=denominator,
            projection=student.projection,
            backend=backend,
            row_seeds=_row_seeds(objective, batch, draw),
        )


def _row_seeds(objective: losses.Objective, batch: Batch, draw: int) -> list[int]:
    """A seed per row from the step's draw and the row's id; empty where nothing is drawn."""
    if objective.lens is None or objective.lens.token_fraction == 1.0:
        return []
    digests = (hashlib.sha256(f"{draw}\0{example_id}".encode()).digest() for example_id in batch.example_ids)
    return [int.from_bytes(digest[:8], "big", signed=True) for digest in digests]


def _student_states(model: PreTrainedModel, batch: Batch, layers: Sequence[int]) -> losses.States:
    output = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
    )
    flat = {layer: output.hidden_states[layer].flatten(0, 1) for layer in layers}
    return lambda layer, positions: flat[layer][positions]
