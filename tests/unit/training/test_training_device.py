"""Peak memory of one run, not of the process."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline.training.device import autocast_dtype, flush_denormals, peak_memory_gib, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_the_peak_is_that_of_what_follows_the_reset() -> None:
    block = torch.ones(300 << 18)  # 300 MiB
    before = peak_memory_gib(CPU)
    del block
    reset_peak_memory(CPU)
    assert peak_memory_gib(CPU) < before - 0.2
    block = torch.ones(300 << 18)
    assert peak_memory_gib(CPU) > before - 0.1
    del block


def test_denormals_are_flushed() -> None:
    flush_denormals()
    try:
        assert float(torch.tensor([1e-39]) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)


def test_precision_auto_follows_the_device() -> None:
    assert autocast_dtype("auto", CPU) is None
    assert autocast_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert autocast_dtype("bf16", CPU) is torch.bfloat16 and autocast_dtype("fp32", torch.device("cuda")) is None
