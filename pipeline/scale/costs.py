"""Seconds of every part of a distillation, with the teacher online and from a cache; units as in `shapes`.

Coefficients in bytes were counted, not fitted to times; tests/unit/core/test_core_scale.py counts them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.losses.fused import default_chunk_tokens
from pipeline.scale.shapes import (
    Case,
    Machine,
    Method,
    Shape,
    block_weights,
    cache_bytes,
    forward_flops,
    objective_flops,
    parameters,
    training_flops,
)

_UPDATE = 40
"""Bytes moved per parameter and step: fused AdamW reads 16 and writes 12, clipping reads the gradient twice and writes it."""
_HEAD_GRADIENT = 24
"""Bytes moved per head weight and call of the fused objective: zeroed 4, scaled 8, added to the other calls' 12."""
# Autocast reads a float32 weight and writes its bfloat16 copy; backward does the same to the gradient.
_CAST_FORWARD, _CAST_TRAINING = 6, 12


@dataclass(frozen=True)
class PerToken:
    """Bytes per token and layer: d·width + kv·kv_width + f·ffn."""

    d: float
    kv: float
    f: float

    def of(self, shape: Shape) -> float:
        """Bytes per token in all layers."""
        return shape.layers * (self.d * shape.width + self.kv * shape.kv_width + self.f * shape.ffn)


# By (gated_mlp, half): inputs and outputs of every operation between the matrix products.
_FORWARD = {
    (True, False): PerToken(137, 34, 18),
    (True, True): PerToken(161, 26, 9),
    (False, False): PerToken(41, 0, 72),
    (False, True): PerToken(49, 0, 36),
}
_TRAINING = {
    (True, False): PerToken(475, 84, 53),
    (True, True): PerToken(535, 66, 26),
    (False, False): PerToken(133, 0, 188),
    (False, True): PerToken(143, 0, 94),
}


def body_seconds(shape: Shape, machine: Machine, tokens: float, context: float, passes: float, *, training: bool) -> float:
    """Seconds of the blocks over `tokens` tokens in `passes` forward passes (and as many backward, in training)."""
    kind = (shape.gated_mlp, machine.half)
    flops = training_flops(shape, tokens, context) if training else forward_flops(shape, tokens, context)
    moved = tokens * (_TRAINING if training else _FORWARD)[kind].of(shape)
    cast = passes * block_weights(shape) * (_CAST_TRAINING if training else _CAST_FORWARD) if machine.half else 0.0
    return flops / machine.body_flops + moved / machine.activation_bandwidth + cast / machine.memory_bandwidth


def objective_seconds(
    student: Shape, teacher: Shape, method: Method, machine: Machine, response_tokens: float, passes: float
) -> float:
    """Seconds of the objective on `response_tokens` response tokens in `passes` micro-batches."""
    products = response_tokens * objective_flops(student, teacher, method) / machine.lens_flops
    weights = objective_traffic(student, teacher, method, machine, response_tokens) / machine.memory_bandwidth
    own = student.head_weights
    cast = _CAST_FORWARD * (own + teacher.width * student.vocab) if machine.half else 0
    gradient = passes * method.calls * (cast + (_HEAD_GRADIENT * own if method.head_gradient else 0))
    rows = response_tokens * (method.divergences + int(method.cross_entropy))
    return max(products, weights) + gradient / machine.memory_bandwidth + rows * student.vocab / machine.entries


def objective_traffic(student: Shape, teacher: Shape, method: Method, machine: Machine, response_tokens: float) -> float:
    """Bytes of both heads and of the head's gradient that the chunks' products move: all of them once per chunk."""
    size = 2 if machine.half else 4
    # A half-precision product is written, read and added to the float32 sum; in float32 it is added in the product.
    gradient = (size + size + 8 if machine.half else 8) if method.head_gradient else 0
    own, other = student.head_weights, teacher.width * student.vocab
    chunks = response_tokens / default_chunk_tokens(student.vocab)
    per_divergence = (2 * size + gradient) * own + size * other
    return chunks * (method.divergences * per_divergence + int(method.cross_entropy) * (2 * size + gradient) * own)


def update_seconds(student: Shape, machine: Machine) -> float:
    """Seconds of clipping and AdamW in one optimiser step."""
    return _UPDATE * parameters(student) / machine.memory_bandwidth


def step_seconds(case: Case, method: Method, machine: Machine, *, online: bool) -> float:
    """Seconds of one optimiser step of the workload's batch on one device, the teacher's forward pass included if online.

    From a cache the states are read beside the step before, which shows only where reading takes longer.
    """
    work, passes = case.workload, case.workload.micro_batches
    tokens, response = work.batch * work.tokens, work.batch * work.response_tokens
    own = (
        body_seconds(case.student, machine, tokens, work.tokens, passes, training=True)
        + objective_seconds(case.student, case.teacher, method, machine, response, passes)
        + update_seconds(case.student, machine)
    )
    if not method.divergences:
        return own
    if online:
        return own + body_seconds(case.teacher, machine, tokens, work.tokens, passes, training=False)
    return max(own, work.batch * _read_bytes(case, method) / machine.disk_read)


def teacher_seconds(case: Case, machine: Machine) -> float:
    """Seconds of the teacher's forward passes over all rows once, in training's precision, on one device."""
    work = case.workload
    return body_seconds(
        case.teacher, machine, work.rows * work.tokens, work.tokens, work.rows / work.micro_batch, training=False
    )


def capture_seconds(case: Case, machine: Machine) -> float:
    """Seconds of a capture on one device: forward passes in float32, the shards being written beside them."""
    plain = replace(machine, body_flops=machine.float32_flops, half=False)
    return max(teacher_seconds(case, plain), cache_bytes(case) / machine.disk_write)


def student_seconds(case: Case, method: Method, machine: Machine, *, online: bool) -> float:
    """Seconds of one training run on one device."""
    steps = case.workload.epochs * case.workload.rows / case.workload.batch
    return steps * step_seconds(case, method, machine, online=online)


def _read_bytes(case: Case, method: Method) -> float:
    """Bytes that a row's states have on disk for a method."""
    held = case.workload.cached_layers
    return cache_bytes(case) / case.workload.rows * method.divergences / held if held else 0.0


def read_bandwidth(case: Case, method: Method, machine: Machine) -> float:
    """Bytes/s that one run reads from the cache where reading does not hold it up."""
    if not method.divergences:
        return 0.0
    fast = replace(machine, disk_read=math.inf)
    return case.workload.batch * _read_bytes(case, method) / step_seconds(case, method, fast, online=False)


@dataclass(frozen=True)
class Costs:
    """Device time of an experiment.

    Attributes:
        capture: seconds of the capture.
        online: seconds of all training runs with the teacher beside them.
        cached: seconds of all training runs from the cache, the capture not included.
        longest: seconds of the longest run from the cache.
        longest_online: seconds of the longest run with the teacher beside it.
        break_even: training runs with a teacher from which on capture and cache take less device time; None: never.
    """

    capture: float
    online: float
    cached: float
    longest: float
    longest_online: float
    break_even: int | None


def costs(case: Case, machine: Machine) -> Costs:
    """Device time with the teacher online and from a cache."""
    work = case.workload
    online = [student_seconds(case, method, machine, online=True) for method in work.methods]
    cached = [student_seconds(case, method, machine, online=False) for method in work.methods]
    capture = capture_seconds(case, machine)
    taught = [a - b for a, b, method in zip(online, cached, work.methods, strict=True) if method.divergences]
    return Costs(
        capture, work.seeds * sum(online), work.seeds * sum(cached), max(cached), max(online), break_even(capture, taught)
    )


def break_even(capture: float, saved: Sequence[float]) -> int | None:
    """Training runs after which what they save, taken in turn from `saved`, exceeds what the capture costs; seconds.

    None where they save nothing, however many there are.
    """
    mean = sum(saved) / len(saved) if saved else 0.0
    return math.floor(capture / mean) + 1 if mean > 0 else None


def workers_needed(found: Costs, students: int, wall: float, *, processes: int, cached: bool) -> int | None:
    """Devices that finish within `wall` seconds, `processes` on each run; None where one run alone takes longer.

    A capture is divided among all of them and comes first; the runs then go to whoever is free, at worst a longest run later
    than an even division would end (Graham 1966). Devices of one run divide its time evenly.
    """
    longest, total = (found.longest, found.cached) if cached else (found.longest_online, found.online)
    for slots in range(1, students + 1):
        spent = found.capture / slots if cached else 0.0
        spent += longest if slots == students else total / slots + longest * (1 - 1 / slots)
        if spent / processes <= wall:
            return slots * processes
    return None
