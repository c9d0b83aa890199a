"""Training that breaks down says at which step and on which rows, and keeps its last good checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from faults_setup import ALL, Tally
from pydantic import ValidationError

from pipeline.config.methods import Training
from pipeline.errors import PipelineError, TrainingError
from pipeline.plan import Plan
from pipeline.stages import train
from pipeline.training import loop, step

METHODS = {"kd": None, "distilllens": {"lens": {"pairs": {"kind": "uniform", "count": 2}}}}
SETTINGS = ("validation.select=loss", "train.seeds=[10]", "train.max_steps=5", "train.micro_batch_size=6")


def planned(folder: Path, *overrides: str, run_dir: str = "runs") -> Plan:
    return stages.run_inputs(stages.planned(folder, *SETTINGS, *overrides, run_dir=folder / run_dir, methods=METHODS))


def spoiled(monkeypatch: pytest.MonkeyPatch, at: int, spoil: Callable[[dict[str, float], Any], dict[str, float]]) -> None:
    """Let the values of the step `at` come out otherwise."""
    real, calls = loop.optimizer_step, iter(range(1, 100))

    def wrong(student: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        values = real(student, *args, **kwargs)
        return spoil(values, student) if next(calls) == at else values

    monkeypatch.setattr(loop, "optimizer_step", wrong)


@pytest.mark.parametrize(
    ("fault", "name", "value"),
    [
        ("NaN loss", "loss", math.nan),
        ("infinite loss", "loss", math.inf),
        ("exploded gradient", "grad_norm", math.inf),
    ],
)
@pytest.mark.parametrize("at", [1, 4] if ALL else [4])
def test_numbers_that_are_not_finite_end_training(
    fault: str, name: str, value: float, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plan = planned(tmp_path)
    kd = stages.training(plan, "kd")
    with monkeypatch.context() as patch:
        spoiled(patch, at, lambda values, _: {**values, name: value})
        with pytest.raises(
            TrainingError, match=rf"step {at}: .*'{name}'.* is not finite; rows \['.+'(, '.+'){{5}}\]\. "
        ) as raised:
            train.run(kd)
    kept = (
        f"The checkpoint of step 2 is kept in {kd.place.path}.partial/checkpoint" if at == 4 else "There is no checkpoint yet"
    )
    train.run(kd)
    other = planned(tmp_path, run_dir="other")
    train.run(stages.training(other, "kd"))
    weights = [p.place.path / "model" / "model.safetensors" for p in (kd, stages.training(other, "kd"))]
    same = weights[0].read_bytes() == weights[1].read_bytes()
    tally(fault, kept in str(raised.value) and same, f"{raised.value}; same weights: {same}")


def test_a_gradient_that_explodes_is_seen_in_the_gradient_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plan = planned(tmp_path)
    real = step.update

    def exploding(student: Any, optimizer: Any, limit: Any) -> Any:
        next(student.model.parameters()).grad[0, 0] = float("inf")
        return real(student, optimizer, limit)

    monkeypatch.setattr(step, "update", exploding)
    with pytest.raises(TrainingError, match=r"step 1: \{'grad_norm': (inf|nan)\} is not finite") as raised:
        train.run(stages.training(plan, "kd"))
    tally("exploded gradient", "There is no checkpoint yet" in str(raised.value), str(raised.value))


def no_memory_for(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception, once: bool = False) -> list[int]:
    """Let passes over more than `rows` rows fail after their gradients are there; returns the rows of every pass."""
    real: Any = step.micro_batch_loss
    passes: list[int] = []

    def failing(student: Any, teacher: Any, objective: Any, batch: Any, **kwargs: Any) -> Any:
        passes.append(len(batch.example_ids))
        terms = real(student, teacher, objective, batch, **kwargs)
        if len(batch.example_ids) > rows:
            torch.rand(3)  # a dropout mask that was drawn
            terms.total.backward()
            raise error
        return terms

    monkeypatch.setattr(step, "micro_batch_loss", failing)
    return passes


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]


def losses(plan: Plan, method: str) -> list[float]:
    path = stages.training(plan, method).place.path / "metrics.jsonl"
    records = [json.loads(line)["metrics"] for line in path.read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_without_leave_no_memory_ends_training(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plan = planned(tmp_path)
    no_memory_for(monkeypatch, 3, error)
    with pytest.raises(
        TrainingError, match=r"step 1: no memory for 6 rows in one pass .*; rows \[.*micro_batch_size"
    ) as raised:
        train.run(stages.training(plan, "kd"))
    tally("out of memory", "There is no checkpoint yet" in str(raised.value), str(raised.value))


@pytest.mark.parametrize("method", ["kd", "distilllens"] if ALL else ["distilllens"])
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_with_leave_the_same_steps_are_made_with_half_the_rows_a_pass(
    error: Exception, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    whole = planned(tmp_path)
    halved = planned(tmp_path, "train.halve_micro_batch_on_oom=true", run_dir="halved")
    ours = stages.training(halved, method)
    assert ours.place.fingerprint == stages.training(whole, method).place.fingerprint
    train.run(stages.training(whole, method))
    passes = no_memory_for(monkeypatch, 3, error)
    train.run(ours)
    assert passes == [6, *[3, 3] * 5]
    expected, found = losses(whole, method), losses(halved, method)
    tally("out of memory, halved", found == pytest.approx(expected, rel=1e-5), f"{found} is not {expected}")


def test_it_halves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    plan = planned(tmp_path, "train.halve_micro_batch_on_oom=true")
    passes = no_memory_for(monkeypatch, 2, ERRORS[0])
    with pytest.raises(TrainingError, match="step 1: no memory for 3 rows in one pass"):
        train.run(stages.training(plan, "kd"))
    tally("out of memory, twice", passes == [6, 3], str(passes))


def test_it_does_not_halve_where_rows_that_share_a_pass_change_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plan = planned(tmp_path, "train.halve_micro_batch_on_oom=true", "methods.distilllens.lens.mask_layout=official")
    passes = no_memory_for(monkeypatch, 3, ERRORS[0])
    with pytest.raises(TrainingError, match="step 1: no memory for 6 rows in one pass"):
        train.run(stages.training(plan, "distilllens"))
    tally("out of memory, rows that meet", passes == [6], str(passes))


def test_an_update_that_has_begun_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    plan = planned(tmp_path, "train.halve_micro_batch_on_oom=true")
    real = torch.optim.AdamW.step
    updates: list[int] = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        updates.append(1)
        real(self, *args, **kwargs)
        raise ERRORS[0]

    monkeypatch.setattr(loop, "adamw", _with_step(loop.adamw, failing))
    with pytest.raises(PipelineError, match="step 1: no memory"):
        train.run(stages.training(plan, "kd"))
    tally("out of memory in the update", updates == [1], str(updates))


def _with_step(make: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        optimizer = make(*args)
        kind = type("Failing", (type(optimizer),), {"step": function})
        optimizer.__class__ = kind
        optimizer._patch_step_function()  # hooks are called by a wrapper of the class's own step
        return optimizer

    return made


def test_several_processes_may_not_halve() -> None:
    with pytest.raises(ValidationError, match="halve_micro_batch_on_oom is for one process"):
        Training(max_steps=1, halve_micro_batch_on_oom=True, launch={"processes": 2})  # type: ignore[arg-type]
