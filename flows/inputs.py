"""What trials start from, each made once: rows, teacher, untrained student, the teacher's states and responses."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.plan import Plan
from pipeline.tracking import Tracker
from tasks.cache import cache_teacher
from tasks.finetune_teacher import finetune_teacher
from tasks.import_model import import_model
from tasks.prepare import prepare
from tasks.seqkd import generate
from tasks.student import initialise_student

Made = dict[str, str]
"""Fingerprint or digest → the stage's tracked run, of everything that this flow has seen to. It holds one entry a task."""


def make_rows(plan: Plan, tracker: Tracker, made: Made) -> dict[str, str]:
    """Models and tokenised rows; returns stage → tracked run."""
    name = plan.experiment.name
    for model in plan.models:
        _once(made, f"import {model.digest}", lambda model=model: str(import_model(model)))  # type: ignore[misc]
    runs = {"prepare": _once(made, plan.data.place.fingerprint, lambda: prepare(plan.data, name, tracker))}
    for rows in plan.benchmarks:
        _once(made, rows.place.fingerprint, lambda rows=rows: prepare(rows, name, tracker))  # type: ignore[misc]
    return runs


def make_models(plan: Plan, tracker: Tracker, made: Made) -> dict[str, str]:
    """Tuned teacher, untrained student, the teacher's states; returns stage → tracked run."""
    name, runs = plan.experiment.name, {}
    finetune, states = plan.finetune, plan.cache
    if finetune is not None:
        runs["teacher"] = _once(made, finetune.place.fingerprint, lambda: finetune_teacher(finetune, name, tracker))
    runs["student"] = _once(made, plan.student.place.fingerprint, lambda: initialise_student(plan.student, name, tracker))
    if states is not None:
        runs["cache"] = _once(made, states.place.fingerprint, lambda: cache_teacher(states, name, tracker))
    return runs


def make_generations(plan: Plan, tracker: Tracker, made: Made) -> dict[str, str]:
    """The teacher's responses that methods train on; returns stage → tracked run."""
    name = plan.experiment.name
    return {
        f"seqkd.{generation.place.fingerprint}": _once(
            made, generation.place.fingerprint, lambda generation=generation: generate(generation, name, tracker)  # type: ignore[misc]
        )
        for generation in plan.generations
    }  # fmt: skip


def _once(made: Made, key: str, make: Callable[[], str]) -> str:
    if key not in made:
        made[key] = make()
    return made[key]
