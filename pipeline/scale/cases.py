"""The three cases of docs/scale.md, and the machines they are computed for."""

from __future__ import annotations

import math
from dataclasses import replace

from pipeline.scale.shapes import DISTILLLENS, KD, RKL, SFT, Case, Machine, Shape, Workload

GPT2 = Shape(12, 768, 3072, 50_257, 12, 12, tied=True, gated_mlp=False, biases=True, positions=1024)
GPT2_XL = Shape(48, 1600, 6400, 50_257, 25, 25, tied=True, gated_mlp=False, biases=True, positions=1024)
TINYLLAMA = Shape(22, 2048, 5632, 32_000, 32, 4, tied=False, gated_mlp=True)
LLAMA_7B = Shape(32, 4096, 11_008, 32_000, 32, 32, tied=False, gated_mlp=True)
LLAMA3_8B = Shape(32, 4096, 14_336, 128_256, 32, 8, tied=False, gated_mlp=True)
LLAMA3_70B = Shape(80, 8192, 28_672, 128_256, 64, 8, tied=False, gated_mlp=True)


# Lengths: 1,000 Dolly rows in the alpaca template with GPT-2's tokenizer have 146 input tokens, 76 of them response; batches of
# 16 rows pad 4 %.
_METHODS = (SFT, KD, RKL, DISTILLLENS)
_ROWS = Workload(1_000_000, 152.0, 76.0, epochs=2, batch=64, micro_batch=16, methods=_METHODS, seeds=3)
CASES = (
    Case("GPT-2 XL → 120M", GPT2_XL, GPT2, _ROWS),
    Case("Llama 7B → 1.1B", LLAMA_7B, TINYLLAMA, replace(_ROWS, micro_batch=8)),
    Case("Llama 3 70B → 8B", LLAMA3_70B, LLAMA3_8B, replace(_ROWS, micro_batch=8)),
)

UTILISATION = 0.4
"""Share of the datasheet's FLOP/s, assumed."""
BANDWIDTH_SHARE = 0.7
"""Share of the datasheet's bytes/s, assumed."""
_ENTRY = 20
"""Bytes of memory traffic per vocabulary entry and row of a compiled divergence on half-precision logits of both sides: four
passes of 2 + 2 bytes (maximum, normaliser, divergence, gradient's mean), the gradient written and read once."""


def gpu(name: str, *, bfloat16: float, float32: float, bandwidth: float, memory_bytes: float, nvlink: float) -> Machine:
    """A machine of eight such GPUs from datasheet figures, the assumed shares of them, and assumed storage.

    Args:
        name: for tables.
        bfloat16: dense FLOP/s of the tensor cores.
        float32: FLOP/s without tensor cores: float32 products do not use them unless told to.
        bandwidth: bytes/s of the device's memory.
        memory_bytes: bytes of it.
        nvlink: bytes/s, both directions together.
    """
    moved = BANDWIDTH_SHARE * bandwidth
    return Machine(
        name, body_flops=UTILISATION * bfloat16, float32_flops=UTILISATION * float32, lens_flops=UTILISATION * bfloat16,
        entries=moved / _ENTRY, activation_bandwidth=moved, memory_bandwidth=moved, memory=memory_bytes, devices=8,
        link=BANDWIDTH_SHARE * nvlink / 2, disk=14e12, disk_read=6e9, disk_write=3e9, network=12.5e9, half=True,
    )  # fmt: skip


A100 = gpu("A100 SXM 80 GB", bfloat16=312e12, float32=19.5e12, bandwidth=2.039e12, memory_bytes=80e9, nvlink=600e9)
H100 = gpu("H100 SXM 80 GB", bfloat16=989.4e12, float32=66.9e12, bandwidth=3.35e12, memory_bytes=80e9, nvlink=900e9)
HERE = Machine(
    "two Xeon cores, busy", body_flops=94.1e9, float32_flops=94.1e9, lens_flops=71.8e9, entries=29.2e6,
    activation_bandwidth=8.40e9, memory_bandwidth=11.3e9, memory=25e9, devices=1, link=math.inf, disk=270e9,
    disk_read=0.41e9, disk_write=1.13e9, network=math.inf, half=False,
)  # fmt: skip
"""Medians of tests/benchmarks/test_bench_scale.py, float32."""
