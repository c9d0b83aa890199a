"""Models whose tensors are divided among processes: the options of FSDP2 and ZeRO, and whole tensors from their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config.loading import read_yaml
from pipeline.errors import ConfigError

# What `accelerate config` writes for FSDP2, with the values that this pipeline carries out.
_FSDP: dict[str, tuple[Any, ...]] = {
    "fsdp_version": (2,),
    "fsdp_reshard_after_forward": (True, False),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "fsdp_state_dict_type": ("FULL_STATE_DICT",),
    "fsdp_cpu_ram_efficient_loading": (False,),
    "fsdp_offload_params": (False,),
    "fsdp_activation_checkpointing": (False,),
}


@dataclass(frozen=True)
class Sharding:
    """Options of FSDP2.

    Attributes:
        reshard_after_forward: let a block's gathered parameters go between its forward and its backward pass.
    """

    reshard_after_forward: bool = True


@dataclass(frozen=True)
class Zero:
    """Options of DeepSpeed's ZeRO.

    Attributes:
        options: the section `zero_optimization` of its configuration.
    """

    options: Mapping[str, Any]

    @property
    def stage(self) -> int:
        """2 divides gradients and optimiser state, 3 the parameters too."""
        return int(self.options["stage"])


Division = Sharding | Zero
"""How processes divide a model that none of them has alone."""


def read_division(strategy: str, config: Path | None, what: str) -> Division | None:
    """What a strategy and its configuration file say; `what` is the dotted path of the launch, for messages.

    Raises:
        ConfigError: the file cannot be read, or has an option that is not carried out.
    """
    if strategy == "ddp":
        return None
    if strategy == "fsdp":
        return Sharding() if config is None else _sharding(_mapping(config, f"{what}.config"), config, f"{what}.config")
    if config is None:
        raise ConfigError(
            f"{what}.config: strategy deepspeed needs DeepSpeed's JSON file with zero_optimization.stage; give its path"
        )
    return _zero(_mapping(config, f"{what}.config"), config, f"{what}.config")


def _mapping(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_yaml(path)  # JSON is YAML, too
    except ConfigError as error:
        raise ConfigError(f"{what}: {path}: {error.problems[0]}") from None


def _sharding(found: dict[str, Any], path: Path, what: str) -> Sharding:
    options = found.get("fsdp_config")
    if not isinstance(options, dict):
        raise ConfigError(f"{what}: {path} has no fsdp_config; write one with `accelerate config`")
    for name, value in options.items():
        allowed = _FSDP.get(name)
        if allowed is None:
            raise ConfigError(f"{what}: fsdp_config.{name} is not supported; remove it (allowed: {', '.join(sorted(_FSDP))})")
        if value not in allowed:
            raise ConfigError(f"{what}: fsdp_config.{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    if "fsdp_version" not in options:
        raise ConfigError(f"{what}: fsdp_config.fsdp_version is missing, which means FSDP1; set it to 2")
    return Sharding(options.get("fsdp_reshard_after_forward", True))


def _zero(found: dict[str, Any], path: Path, what: str) -> Zero:
    options = found.get("zero_optimization")
    if not isinstance(options, dict) or options.get("stage") not in (2, 3):
        raise ConfigError(f"{what}: {path} needs zero_optimization.stage 2 or 3; set it")
    given = [name for name, value in found.items() if name != "zero_optimization" and not _automatic(value)]
    given += [
        f"zero_optimization.{name}" for name, value in options.items() if name.startswith("offload") and value is not None
    ]
    if given:
        raise ConfigError(f'{what}: {given[0]} is not supported: this pipeline sets it; remove it, or set it to "auto"')
    return Zero(options)


def _automatic(value: Any) -> bool:
    """Whether a setting, or every setting of a section, is left to whoever reads the file."""
    return all(map(_automatic, value.values())) if isinstance(value, dict) else value == "auto"


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; if it is divided, every process of the group must call this at the same moment."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):  # a parameter of ZeRO-3
        import deepspeed

        gathered: Tensor = deepspeed.utils.safe_get_full_fp32_param(tensor)
        return gathered
    return tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor divided as `model` is; every process must have all of it."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
