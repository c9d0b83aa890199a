"""LoRA through the stages: the adapter is saved, a merged checkpoint on request, and both evaluate alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Artifact
from pipeline.models.lora import is_adapter
from pipeline.plan import Plan
from pipeline.stages import evaluate, finetune_teacher, fit, prepare, train

SETTINGS = ("validation.select=loss", "train.seeds=[10]", "train.learning_rate=1e-2")
IDS = torch.arange(1, 20)[None]


def planned(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return stages.planned(folder, *SETTINGS, *overrides, **{"methods": {"kd": None}, **changes})


def trained(plan: Plan) -> Artifact:
    return train.run(stages.training(stages.run_inputs(plan), "kd"))


@torch.no_grad()
def logits(plan: Plan) -> torch.Tensor:
    trial = next(trial for trial in plan.trials if trial.method == "kd")
    return evaluate.load_subject(trial.evaluations[0].subject).model(IDS).logits


def test_the_adapter_alone_is_saved_and_evaluated_on_the_untrained_student(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.lora.rank=2")
    artifact = trained(plan)
    assert is_adapter(artifact.path / "model") and not (artifact.path / "model" / "model.safetensors").exists()
    assert json.loads((artifact.path / "model" / "adapter_config.json").read_text())["r"] == 2
    assert (artifact.path / "model" / "tokenizer.json").exists()
    base = AutoModelForCausalLM.from_pretrained(plan.student.place.path)
    with torch.no_grad():
        assert not torch.allclose(logits(plan), base(IDS).logits, atol=1e-3)


def test_a_merged_checkpoint_is_whole_and_the_same_model(tmp_path: Path) -> None:
    apart = planned(tmp_path, "train.lora.rank=2")
    trained(apart)
    merged = planned(tmp_path, "train.lora.rank=2", "train.lora.save_merged=true")
    artifact = trained(merged)
    assert is_adapter(artifact.path / "adapter") and not is_adapter(artifact.path / "model")
    plain = AutoModelForCausalLM.from_pretrained(artifact.path / "model")
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, logits(apart), atol=1e-5)
    assert torch.equal(plain(IDS).logits, logits(merged))
    assert not (artifact.path / "checkpoint").exists() and not (artifact.path / "model.fresh").exists()


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path, "train.lora.save_merged=true", "train.learning_rate=[1e-3, 1e-2]")
    stages.run_inputs(plan)
    load_fitted = fit.load_fitted

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "load_fitted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(plan)
    monkeypatch.setattr(fit, "load_fitted", load_fitted)
    artifact = trained(plan)
    assert is_adapter(artifact.path / "adapter") and (artifact.path / "model" / "model.safetensors").exists()


def test_adapter_settings_are_part_of_the_fingerprint_and_none_changes_nothing(tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        return stages.training(planned(tmp_path, *overrides), "kd").place.fingerprint

    plans = {
        fingerprint(),
        fingerprint("train.lora={}"),
        fingerprint("train.lora.rank=2"),
        fingerprint("train.lora.dropout=0.1"),
    }
    assert len(plans) == 4
    assert "lora" not in stages.training(planned(tmp_path), "kd").place.recipe["training"]


def test_a_teacher_is_tuned_by_lora(tmp_path: Path) -> None:
    tune = {
        "train": {"max_steps": 3, "batch_size": 6, "learning_rate": 1e-2, "lora": {"rank": 2, "save_merged": True}},
        "validation": {"select": "loss"},
    }
    plan = planned(tmp_path, teacher_finetune=tune)
    prepare.run(plan.data)
    assert plan.finetune is not None
    artifact = finetune_teacher.run(plan.finetune)
    before = load_file(tmp_path / "teacher" / "model.safetensors")
    after = load_file(artifact.path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
