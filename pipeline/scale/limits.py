"""Memory of a device, exchange among devices, and which resource is the first to be too small; units as in `shapes`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.losses.fused import default_chunk_tokens
from pipeline.scale.costs import PerToken, costs, read_bandwidth, step_seconds, workers_needed
from pipeline.scale.shapes import Case, Machine, Method, Shape, block_weights, cache_bytes, parameters

Strategy = Literal["ddp", "fsdp"]
Choice = Literal["cache", "online", "neither"]

_ADAMW_STATE = 16
"""Bytes per parameter in float32: the parameter, its gradient and AdamW's two moments."""
_CAST_KEPT = 2
"""Bytes per block weight of autocast's copy, which the backward pass needs."""
# By (gated_mlp, half): what autograd keeps.
_KEPT = {
    (True, False): PerToken(40, 0, 16),
    (True, True): PerToken(34, 0, 8),
    (False, False): PerToken(32, 0, 20),
    (False, True): PerToken(20, 0, 10),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a student trains.

    Attributes:
        state: float32 parameters, gradients and AdamW's moments.
        gathered: what FSDP holds whole beside its share, and autocast's copies of the weights.
        activations: kept for the backward pass, of one micro-batch.
        objective: head gradients, copies of both heads, two chunks of logits, states at the compared layers.
        teacher: its float32 parameters, or those of its head alone.
    """

    state: float
    gathered: float
    activations: float
    objective: float
    teacher: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.gathered + self.activations + self.objective + self.teacher


def memory(case: Case, method: Method, *, half: bool, strategy: Strategy = "ddp", processes: int = 1, online: bool) -> Memory:
    """Bytes on each of `processes` devices that train one student together; the teacher is whole on each of them."""
    student, teacher, work = case.student, case.teacher, case.workload
    held, own, other = parameters(student), student.head_weights, teacher.width * student.vocab
    rows = work.micro_batch * work.response_tokens
    whole = float(_CAST_KEPT * block_weights(student) if half else 0)
    if strategy == "fsdp":
        blocks = block_weights(student) / student.layers
        # Embedding and head stay gathered with their gradients; of the blocks one computes while the next one is fetched.
        whole += 8 * (held - block_weights(student)) + 4 * 3 * blocks
    size = 2 if half else 4
    copies = 2 * (own + other) if half else 0
    chunk = 2 * size * default_chunk_tokens(student.vocab) * student.vocab
    states = 4 * rows * (2 * student.width + teacher.width) * method.divergences
    gradients = 4 * own * method.calls if method.head_gradient else 0
    taught = bool(method.divergences)
    grids = 4 * work.micro_batch * work.tokens * teacher.width * method.divergences if online else 0
    return Memory(
        state=_ADAMW_STATE * held / (processes if strategy == "fsdp" else 1),
        gathered=whole,
        activations=work.micro_batch * work.tokens * _KEPT[student.gated_mlp, half].of(student),
        objective=gradients + copies + chunk + states + (grids if taught else 0),
        teacher=4 * (parameters(teacher) if online else other) if taught else 0,
    )


def exchange_bytes(student: Shape, strategy: Strategy, processes: int, passes: int) -> float:
    """Bytes that each device sends per optimiser step when `processes` train together.

    DDP sums float32 gradients in a ring once per step. FSDP gathers parameters twice (forward, backward) and divides the
    gradients' sum, in each of `passes` micro-batches.
    """
    share = (processes - 1) / processes
    return 4.0 * parameters(student) * share * (2 if strategy == "ddp" else 3 * passes)


def limits(
    case: Case, machine: Machine, *, workers: int, wall: float, strategy: Strategy, processes: int, cached: bool
) -> dict[str, float]:
    """Demand over supply of each resource; above 1 it does not fit.

    Args:
        case: the work.
        machine: what there is of everything.
        workers: devices in all.
        wall: seconds that everything may take.
        strategy: how devices share a student.
        processes: devices that train one student together.
        cached: from a cache on storage that all machines read while they train, else with the teacher online.

    Returns:
        "memory", "compute", "disk" (bytes of local disk), "disk read", "network" (reading the cache), "link".
    """
    found, work = costs(case, machine), case.workload
    method = max(work.methods, key=lambda method: method.divergences)
    held = memory(case, method, half=machine.half, strategy=strategy, processes=processes, online=not cached).total
    if cached:
        held = max(held, 4.0 * parameters(case.teacher))
    device_seconds = found.capture + found.cached if cached else found.online
    step = step_seconds(case, method, machine, online=not cached) / processes
    passes = math.ceil(work.batch / (work.micro_batch * processes))
    read = min(workers, machine.devices) * max(read_bandwidth(case, each, machine) for each in work.methods) if cached else 0.0
    return {
        "memory": held / machine.memory,
        "compute": device_seconds / (workers * wall),
        "disk": cache_bytes(case) / machine.disk if cached else 0.0,
        "disk read": read / machine.disk_read,
        "network": read / machine.network,
        "link": exchange_bytes(case.student, strategy, processes, passes) / machine.link / step,
    }


def first_limit(demand: Mapping[str, float]) -> str:
    """The resource whose demand is largest beside its supply."""
    return max(demand, key=lambda name: demand[name])


def sharing(case: Case, machine: Machine, *, cached: bool) -> tuple[Strategy, int]:
    """The fewest devices that hold a run, and how: one alone, else FSDP on 2, 4, … of one machine; all of it if none do."""
    method = max(case.workload.methods, key=lambda method: method.divergences)
    processes = 1
    while processes < machine.devices:
        held = memory(case, method, half=machine.half, strategy=_strategy(processes), processes=processes, online=not cached)
        if held.total <= machine.memory:
            break
        processes *= 2
    return _strategy(processes), processes


def recommended(case: Case, machine: Machine, wall: float, *, cached: bool) -> tuple[Strategy, int, int | None]:
    """How to finish within `wall` seconds: strategy, devices of one run, devices in all (None: not with one run on a machine).

    Runs beside each other come first, since they need no exchange; more devices on one only where that is not enough.
    """
    found = costs(case, machine)
    strategy, processes = sharing(case, machine, cached=cached)
    while True:
        workers = workers_needed(found, case.workload.students, wall, processes=processes, cached=cached)
        if workers is not None or processes >= machine.devices:
            return strategy, processes, workers
        processes *= 2


def choice(case: Case, machine: Machine, *, runs: int, epochs: float) -> Choice:
    """Whether `runs` training runs with a teacher, of `epochs` epochs each, read a cache or have the teacher beside them.

    The one that takes less device time, if memory and disk hold it; else the other; "neither" if they hold none of the two.
    """
    fits = {cached: _fits(case, machine, cached=cached) for cached in (False, True)}
    if not any(fits.values()):
        return "neither"
    enough = costs(replace(case, workload=replace(case.workload, epochs=epochs)), machine).break_even
    pays = enough is not None and runs >= enough
    return "cache" if fits[True] and (pays or not fits[False]) else "online"


def _fits(case: Case, machine: Machine, *, cached: bool) -> bool:
    strategy, processes = sharing(case, machine, cached=cached)
    demand = limits(case, machine, workers=processes, wall=math.inf, strategy=strategy, processes=processes, cached=cached)
    return max(demand["memory"], demand["disk"]) <= 1


def _strategy(processes: int) -> Strategy:
    return "ddp" if processes == 1 else "fsdp"
