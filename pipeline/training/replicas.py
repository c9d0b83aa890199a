"""Training by several processes: they divide the rows and, with FSDP2 or ZeRO, the model; sums go over all of them.

The processes are accelerate's, and so is DDP. Its FSDP and DeepSpeed refuse CPUs and take a model's own forward pass, while the
losses here read the head's weights beside it; so both are called as accelerate calls them, around one module whose forward
pass is the whole loss of a micro-batch. It is the same code on CUDA and on CPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.losses.objective import Terms
from pipeline.models.lens import blocks
from pipeline.training import zero
from pipeline.training.sharded import Division, Sharding, Zero
from pipeline.training.step import Student, update
from pipeline.training.zero import ZeroOptimizer

# Only a process that lives and computes can make the others wait: the parent ends them all as soon as one is gone.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Group:
    """The processes that train together, as one of them sees it.

    Attributes:
        accelerator: accelerate's view of the processes.
        division: how they divide the model; None replicates it.
    """

    accelerator: Accelerator
    division: Division | None

    @property
    def rank(self) -> int:
        """This process, counted from 0."""
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the processes; all must call it with as many values."""
        total = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum")
        return [float(value) for value in total.tolist()]

    def gather(self, value: float) -> list[float]:
        """Every process's value, by rank."""
        return self.sum([value if rank == self.rank else 0.0 for rank in range(self.size)])

    def attach(self, student: Student, make: Callable[[], torch.optim.Optimizer], max_grad_norm: float | None) -> Replica:
        """Share a student, whose parameters must be equal in all processes; `make` gives an optimiser of them."""
        module = _Loss(student)
        if isinstance(self.division, Zero):
            engine, optimizer = zero.initialise(
                module, student.model.get_output_embeddings(), self.division, make, max_grad_norm
            )
            return Replica(self, student, engine, optimizer, max_grad_norm)
        if self.division is None:
            return Replica(self, student, self.accelerator.prepare_model(module), make(), max_grad_norm)
        _shard(module, self.division, self.accelerator.device)
        return Replica(self, student, module, make(), max_grad_norm)


@dataclass(frozen=True)
class Replica:
    """A student that the processes of a group share.

    Attributes:
        group: the processes.
        student: what is trained.
        module: the student, as its loss.
        optimizer: of its parameters.
        max_grad_norm: None leaves gradients as they are.
    """

    group: Group
    student: Student
    module: Any
    optimizer: torch.optim.Optimizer | ZeroOptimizer
    max_grad_norm: float | None

    def backward(self, compute: Callable[[Student], Terms], last: bool) -> Terms:
        """Forward and backward pass of one micro-batch; gradients are summed over the processes.

        Args:
            compute: the loss, this process's share of the step's; all processes must make as many calls.
            last: whether the step's gradients are complete after it.
        """
        if isinstance(self.optimizer, ZeroOptimizer):
            self.module.set_gradient_accumulation_boundary(last)
            total, parts = self.module(compute)
            self.module.backward(total * self.group.size)
            return Terms(total, parts)
        # What DDP does not need to send before the last pass waits; FSDP would have to keep whole gradients for that.
        waits = not last and self.group.division is None
        with self.group.accelerator.no_sync(self.module) if waits else contextlib.nullcontext():
            total, parts = self.module(compute)
            # All strategies average gradients; the step's loss is the sum of the processes' shares.
            (total * self.group.size).backward()
        return Terms(total, parts)

    def update(self) -> Tensor:
        """Clip the gradients, step and clear them; returns their norm over all processes before clipping."""
        if isinstance(self.optimizer, ZeroOptimizer):
            return zero.step(self.module)
        return update(self.student, self.optimizer, self.max_grad_norm)


def join(rank: int, size: int, rendezvous: Path, division: Division | None) -> Group:
    """Become one of `size` processes of this machine that meet at the file `rendezvous`; each has a CUDA device if any has."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(str(rendezvous), size)  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE
    )  # fmt: skip
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    return Group(Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=handlers), division)


def leave() -> None:
    """End this process's part."""
    torch.distributed.destroy_process_group()


class _Loss(nn.Module):
    """The student with a forward pass that computes a loss, so that DDP and FSDP see every use of its parameters."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        self.projection = student.projection
        self._student = student

    def forward(self, compute: Callable[[Student], Terms]) -> tuple[Tensor, dict[str, Tensor]]:
        # FSDP exchanges a module's parameters for gathered ones during its forward pass: the head has to be looked up anew.
        output = self.model.get_output_embeddings()
        lens = self._student.lens
        head = replace(lens.head, weight=output.weight, bias=output.bias)
        terms = compute(replace(self._student, lens=replace(lens, head=head)))
        return terms.total, terms.parts


def _shard(module: _Loss, sharding: Sharding, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks(module.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(module, mesh=mesh)
