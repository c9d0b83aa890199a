"""The fine-tuned teacher takes the teacher's place everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import stages
import torch
from safetensors.torch import load_file

from pipeline.artifacts import Artifact
from pipeline.plan import Plan
from pipeline.stages import cache, evaluate, finetune_teacher, prepare, seqkd, student
from pipeline.stages.fit import METRICS

TUNE = {"train": {"max_steps": 6, "batch_size": 6, "learning_rate": 5e-3, "seeds": [3]}, "validation": {"select": "loss"}}
METHODS = {"kd": None, "seqkd": {"generation": {"decoding": {"max_new_tokens": 6}}}}
SETTINGS = ("validation.select=loss", "train.seeds=[10]")


def planned(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return stages.planned(folder, *SETTINGS, *overrides, **{"teacher_finetune": TUNE, "methods": METHODS, **changes})


def tuned(plan: Plan) -> Artifact:
    prepare.run(plan.data)
    assert plan.finetune is not None
    return finetune_teacher.run(plan.finetune)


def test_it_learns_the_references_and_keeps_the_teachers_shape(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    artifact = tuned(plan)
    records = [json.loads(line)["metrics"] for line in (artifact.path / METRICS).read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    assert not any("train/loss_task" in record for record in records)
    before, after = load_file(tmp_path / "teacher" / "model.safetensors"), load_file(artifact.path / "model/model.safetensors")
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


def test_everything_that_reads_the_teacher_reads_the_tuned_one(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    artifact = tuned(plan)
    model = artifact.path / "model"
    teacher = next(trial for trial in plan.trials if trial.method == "teacher")
    assert plan.cache is not None
    users = [plan.cache.teacher, plan.generations[0].teacher, plan.student.teacher, stages.training(plan, "kd").teacher]
    assert all(user.folder() == model for user in (*users, teacher.evaluations[0].subject))  # type: ignore[union-attr]
    weights, base = load_file(model / "model.safetensors"), load_file(tmp_path / "teacher" / "model.safetensors")
    made = load_file(student.run(plan.student).path / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(made[name], weights[name]) and not torch.equal(made[name], base[name])
    loaded = evaluate.load_subject(teacher.evaluations[0].subject).model
    assert torch.equal(loaded.get_input_embeddings().weight, weights[name])
    cache.run(plan.cache), seqkd.run(plan.generations[0])
    for upstream in (plan.cache.place.upstream, plan.generations[0].place.upstream, plan.student.place.upstream):
        assert upstream["teacher"] == artifact.fingerprint


def test_rows_are_prepared_without_it(tmp_path: Path) -> None:
    with_tuning, without = planned(tmp_path), planned(tmp_path, teacher_finetune=None)
    assert without.finetune is None
    assert with_tuning.data.place.fingerprint == without.data.place.fingerprint
    assert with_tuning.student.place.fingerprint != without.student.place.fingerprint


def test_another_budget_makes_another_teacher(tmp_path: Path) -> None:
    def fingerprints(*overrides: str) -> list[str]:
        return [place.fingerprint for place in planned(tmp_path, *overrides).places() if place.stage in ("teacher", "train")]

    first = fingerprints()
    assert all(a != b for a, b in zip(first, fingerprints("teacher_finetune.train.max_steps=7"), strict=True))
    assert fingerprints("teacher_finetune.train.micro_batch_size=2") == first


def test_a_search_tunes_the_teacher_too(tmp_path: Path) -> None:
    artifact = tuned(planned(tmp_path, "teacher_finetune.train.learning_rate=[1e-6, 5e-3]"))
    assert artifact.manifest.counts["learning_rate"] == 5e-3
