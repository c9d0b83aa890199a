"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def adamw(
    modules: Iterable[nn.Module], learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with the usual groups: no decay for biases and norms (parameters with fewer than two dimensions)."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused: one pass instead of a dozen, each with a copy of the largest parameter (a third of the time, 0.1 GiB less here).
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=fused)


def learning_rate(step: int, total: int, *, schedule: str, peak: float, floor: float, warmup: int) -> float:
    """The learning rate of optimiser step `step` (0-based) of `total`.

    Linear warm-up over `warmup` steps, then constant, linear or half-cosine from `peak` to `floor`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return floor + (peak - floor) * (1 - progress)
    if schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"schedule {schedule!r} is none of cosine, linear, constant")


class HasGroups(Protocol):
    """An optimiser, as far as its learning rates go."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups."""
        ...


def set_learning_rate(optimizer: torch.optim.Optimizer | HasGroups, value: float) -> None:
    """Use `value` for every parameter group's next step."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(modules: Iterable[nn.Module], max_norm: float | None) -> Tensor:
    """Scale gradients down to a global norm of at most `max_norm`; returns the norm before clipping."""
    parameters = [p for module in modules for p in module.parameters() if p.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
