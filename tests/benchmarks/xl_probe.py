"""One DistillLens step at the paper's full size: GPT-2 XL's shape into GPT-2's, random weights, five pairs, 4 rows of 512.

    python tests/benchmarks/xl_probe.py prepare FOLDER   teacher with its states cached, 6.2 GiB on disk
    python tests/benchmarks/xl_probe.py online  FOLDER   a step with the teacher's forward pass
    python tests/benchmarks/xl_probe.py cached  FOLDER   a step from the cache, with only the teacher's head in memory

Each is a process of its own, so that the peak memory is that of the step; prints one line of JSON. All but the first token
of every row belong to the response, the most that a row of 512 tokens can cost.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.losses.objective import LensTerm, Objective, teacher_layers
from pipeline.models.layers import uniform_pairs
from pipeline.models.lens import load_lens, logit_lens
from pipeline.models.load import load_model
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.device import flush_denormals, peak_memory_gib, reset_peak_memory
from pipeline.training.optim import adamw
from pipeline.training.step import Student, Teacher, optimizer_step

XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
BASE = GPT2Config(n_layer=12, n_embd=768, n_head=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
ROWS, TOKENS, PAIRS, CPU = 4, 512, uniform_pairs(5, 12, 48, "bench"), torch.device("cpu")
OBJECTIVE = Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, False, "aligned"))
LAYERS = teacher_layers(OBJECTIVE, 48)
KEY = CacheKey("gpt2-xl shape", "none", "random", "none", LAYERS, "bfloat16", TOKENS)


def random_model(config: GPT2Config) -> PreTrainedModel:
    """Random weights of GPT-2's scale; one pass instead of the library's own initialisation."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device=CPU)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0)
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    return model.eval()


def examples() -> list[EncodedExample]:
    """Four rows of 512 random tokens."""
    ids = torch.randint(0, XL.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    return [EncodedExample(f"row {index}", tuple(row), 1) for index, row in enumerate(ids)]


def prepare(folder: Path) -> dict[str, Any]:
    teacher = random_model(XL)
    teacher.save_pretrained(folder / "teacher")
    (folder / "cache").mkdir()
    started = time.perf_counter()
    capture(teacher, examples(), LAYERS, folder / "cache", KEY, batch_size=ROWS, pad_token_id=0, device=CPU)
    return {"capture_seconds": time.perf_counter() - started}


def step(folder: Path, cached: bool) -> dict[str, Any]:
    if cached:
        lens = load_lens(folder / "teacher", CPU)
        teacher = Teacher(CachedTeacher(folder / "cache", KEY, num_layers=48, device=CPU), lens)
    else:
        model = load_model(folder / "teacher").eval()
        teacher = Teacher(OnlineTeacher(model), logit_lens(model))
    torch.manual_seed(1)
    model = random_model(BASE).train()
    student = Student(model, logit_lens(model))
    optimizer = adamw(student.modules, 2e-4, 0.01, (0.9, 0.999))
    batch = collate(examples(), 0)
    reset_peak_memory(CPU)
    started = time.perf_counter()
    found = optimizer_step(
        student, teacher, OBJECTIVE, [batch], optimizer, max_grad_norm=1.0, autocast=None, backend="compiled"
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gib": peak_memory_gib(CPU), "response_tokens": sum(batch.response_counts), **found}


def main() -> None:
    torch.set_num_threads(2)
    flush_denormals()
    side, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(prepare(folder) if side == "prepare" else step(folder, side == "cached")))


if __name__ == "__main__":
    main()
