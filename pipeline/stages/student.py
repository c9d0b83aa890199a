"""Stage: the student's initial weights, and where each of its layers comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Artifact, write_text_atomically
from pipeline.config.models import PretrainedStudent, PrunedStudent, ScratchStudent, StudentConfig
from pipeline.data.collate import collate
from pipeline.data.tokenize import read_encoded
from pipeline.errors import ConfigError
from pipeline.models import load
from pipeline.models import student as initial
from pipeline.stages import import_model
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import TRAIN, TrainingDataPlan

VERSION = 1
PROVENANCE = "provenance.json"
_CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class StudentPlan:
    """The untrained student.

    Attributes:
        place: its artifact.
        config: how it is made.
        teacher: what it is made from.
        data: training rows for the angular distance.
        own: the model of a pretrained student.
        layers: L_S.
    """

    place: Place
    config: StudentConfig
    teacher: ModelPlan
    data: TrainingDataPlan
    own: ModelPlan | None
    layers: int

    @property
    def label(self) -> str:
        """What it is, for people: "pruned to 20 of 30 layers"."""
        if self.own is not None:
            return self.own.location.label
        if isinstance(self.config, PrunedStudent):
            return f"pruned to {self.layers} of {self.teacher.config().num_hidden_layers} layers"
        return f"new, {self.layers} layers"


def plan_student(config: StudentConfig, teacher: ModelPlan, data: TrainingDataPlan, root: Path) -> StudentPlan:
    """Plan the student's artifact.

    Raises:
        ConfigError: more layers are kept than the teacher has.
    """
    teacher_layers = teacher.config().num_hidden_layers
    own = import_model.plan_model(config.model, root, "student.model") if isinstance(config, PretrainedStudent) else None
    upstream = {"teacher": teacher.digest}
    recipe: dict[str, Any] = {"kind": config.kind, "tokenizer": data.tokenizer.digest}
    if isinstance(config, PrunedStudent):
        _check_pruning(config, teacher_layers)
        recipe |= {"keep_layers": config.keep_layers, "drop_from": config.drop_from}
        layers = config.keep_layers
        if config.drop_from is None:
            recipe["calibration_rows"] = config.calibration_rows
            upstream["prepare"] = data.place.fingerprint
    elif isinstance(config, ScratchStudent):
        recipe |= config.model_dump()
        layers = config.layers
    else:
        assert own is not None
        upstream = {"model": own.digest}
        layers = own.config().num_hidden_layers
    return StudentPlan(
        place(root, "student", VERSION, "initialise student", recipe, upstream), config, teacher, data, own, layers
    )


def run(plan: StudentPlan) -> Artifact:
    """Make the untrained student: a transformers folder with tokenizer and provenance.json."""

    def work(folder: Path) -> Mapping[str, Any]:
        provenance: list[int] | None = None
        counts: dict[str, Any] = {}
        if isinstance(plan.config, PrunedStudent):
            teacher = load.load_model(plan.teacher.folder())
            block = teacher.config.num_hidden_layers - plan.config.keep_layers
            start, distances = _choose_block(plan, teacher, block)
            model, provenance = initial.prune(teacher, start, block)
            counts = {"drop_from": start + 1, "dropped": block, "angular_distances": distances}
        elif isinstance(plan.config, ScratchStudent):
            model = initial.from_scratch(plan.teacher.config(), _changes(plan.config), plan.config.init_seed)
        else:
            assert plan.own is not None
            model = load.load_model(plan.own.folder())
        model.save_pretrained(folder)
        load.load_tokenizer(plan.data.tokenizer.folder()).save_pretrained(folder)
        write_text_atomically(folder / PROVENANCE, json.dumps({"layers": provenance}))
        return {"parameters": sum(p.numel() for p in model.parameters()), **counts}

    return build(plan.place, work)


def read_provenance(folder: Path) -> list[int] | None:
    """Teacher layer of each student layer 0 … L_S, None for students that were not pruned."""
    layers = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["layers"]
    return None if layers is None else [int(layer) for layer in layers]


def _choose_block(plan: StudentPlan, teacher: Any, block: int) -> tuple[int, list[float] | None]:
    assert isinstance(plan.config, PrunedStudent)
    if plan.config.drop_from is not None:
        return plan.config.drop_from - 1, None
    if block == 0:
        return 0, None
    rows = read_encoded(plan.data.place.open().path / TRAIN)
    chosen = [rows[i] for i in range(min(plan.config.calibration_rows, len(rows)))]
    chosen.sort(key=lambda row: len(row.input_ids))
    batches = (collate(chosen[i : i + _CALIBRATION_BATCH], 0) for i in range(0, len(chosen), _CALIBRATION_BATCH))
    distances = initial.angular_distances(teacher, batches, block)
    return int(torch.argmin(distances)), [round(float(value), 6) for value in distances]


def _check_pruning(config: PrunedStudent, teacher_layers: int) -> None:
    if config.keep_layers > teacher_layers:
        raise ConfigError(
            f"student.keep_layers: {config.keep_layers}, but the teacher has {teacher_layers} layers; give at most that"
        )
    last_start = config.keep_layers + 1
    if config.drop_from is not None and config.drop_from > last_start:
        raise ConfigError(
            f"student.drop_from: {config.drop_from}, but dropping {teacher_layers - config.keep_layers} of {teacher_layers} "
            f"layers must start at layer {last_start} or before"
        )


def _changes(config: ScratchStudent) -> dict[str, int]:
    names = {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
    }
    return {name: value for name, value in names.items() if value is not None}
