"""ZeRO-2 and ZeRO-3 by DeepSpeed, which is imported only where it is used."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.sharded import Zero


class ZeroOptimizer:
    """An optimiser whose state DeepSpeed divides, with the state dict that it would have undivided.

    Args:
        optimizer: as it was given to DeepSpeed.
        parameters: of the model, in the optimiser's order before that.
        parts: this process's parts of the parameters, as DeepSpeed has the optimiser step them.
        link: has DeepSpeed find the state of every parameter, before it is read or set.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], parts: list[Tensor], link: Callable[[], object]
    ) -> None:
        self._optimizer, self._parameters, self._parts, self._link = optimizer, parameters, parts, link

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, for their learning rates."""
        return self._optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by the parameter's index; all processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        held: dict[str, Tensor] = next(iter(self._optimizer.state.values()), {})
        state = {
            index: {
                name: value.clone() if value.ndim == 0 else safe_get_full_optimizer_state(parameter, name)
                for name, value in held.items()
            }
            for index, parameter in enumerate(self._parameters)
        }
        return {"state": state if held else {}}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, whatever divided it; all processes must call it."""
        from deepspeed.utils import safe_set_full_optimizer_state

        names = {name for values in found["state"].values() for name in values}
        for part in self._parts:
            # DeepSpeed makes the state at the first step; its tensors must be there to be filled.
            state = self._optimizer.state[part]
            for name in names:
                given = next(values[name] for values in found["state"].values() if name in values)
                state.setdefault(name, given.clone() if given.ndim == 0 else torch.zeros_like(part))
                if given.ndim == 0:
                    state[name].copy_(given)
        self._link()
        for index, values in found["state"].items():
            for name, value in values.items():
                if value.ndim:
                    safe_set_full_optimizer_state(self._parameters[index], value, name)


def initialise(
    module: nn.Module, head: nn.Module, zero: Zero, make: Callable[[], torch.optim.Optimizer], max_grad_norm: float | None
) -> tuple[Any, ZeroOptimizer]:
    """DeepSpeed's engine around a module, and the optimiser.

    Args:
        module: everything that is trained; its forward pass reads the parameters of `head` without calling it.
        head: part of `module`.
        zero: options.
        make: an optimiser of the module's parameters.
        max_grad_norm: None leaves gradients as they are.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(auto_mpi_discovery=False)  # of the processes that have met already
    optimizer = make()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    config = {
        # One pass at a time: the loop says where a step ends, and divides by the step's tokens itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": dict(zero.options),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if zero.stage == 3:
        for parameter in head.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(module, parameter)
    divided = engine.optimizer
    if zero.stage == 3:
        return engine, ZeroOptimizer(optimizer, parameters, divided.fp32_partitioned_groups_flat, lambda: None)
    parts = divided.single_partition_of_fp32_groups
    return engine, ZeroOptimizer(optimizer, parameters, parts, functools.partial(_link, divided))


def _link(optimizer: Any) -> None:
    """ZeRO-2 keeps views of the state, which its first step makes, of the first group alone; ZeRO-3 looks it up each time."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)


def step(engine: Any) -> Tensor:
    """Clip, update and clear the gradients; returns their norm before clipping."""
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm())
