"""configs/paper executed in shape: the files' own layers, pairs, schedules, batches and α, with tiny widths and random weights.

Everything that is not as in the file is in `reduced`; a test fails if the reduction reaches anything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.config import Experiment, load_experiment
from pipeline.config.methods import TASK_OF_KIND, DistillLens, Mse, SeqKd, Sft, Training
from pipeline.losses.objective import Objective
from pipeline.plan import Plan, plan_experiment
from pipeline.stages import evaluate, finetune_teacher, prepare, train
from pipeline.tracking import flatten
from pipeline.training import loop

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
STEPS = 2
SIBLINGS = ("rkl", "fkl_rkl", "jsd", "akl")
"""Methods with the very budget of kd, for which one step is enough."""


@dataclass(frozen=True)
class Shape:
    """The architecture of a file's models and their numbers of layers.

    Attributes:
        bf16: whether it is run in bfloat16 as the file says; slow on a CPU, so only where the passes are few.
    """

    family: Callable[..., PreTrainedModel]
    teacher: int
    student: int
    bf16: bool


SHAPES = {
    "gpt2-120m": Shape(tiny.gpt2, 48, 12, bf16=True),
    "gpt2-340m": Shape(tiny.gpt2, 48, 24, bf16=False),
    "tinyllama-1.1b": Shape(tiny.llama, 32, 22, bf16=True),
    "qwen2.5-1.5b": Shape(tiny.qwen2, 36, 28, bf16=False),
}


@dataclass(frozen=True)
class Step:
    """What one optimiser step was given."""

    rows: tuple[int, ...]
    objective: Objective
    student_layers: int
    teacher_layers: int | None
    max_grad_norm: float | None
    autocast: torch.dtype | None
    weight_decay: float
    betas: tuple[float, float]
    trained: frozenset[str]


@dataclass(frozen=True)
class Ran:
    """A file as it is, its reduced self, and what the reduced one did."""

    shape: Shape
    published: Experiment
    plan: Plan
    steps: dict[str, list[Step]]
    rates: dict[str, list[float]]


def reduced(name: str, folder: Path) -> list[str]:
    """Every override: models and rows from this machine, a step or two, short responses, no compiler."""
    own = load_experiment(CONFIGS / f"{name}.yaml")
    changes = [
        f"teacher.path={folder / 'teacher'}",
        f"student.model.path={folder / 'student'}",
        f"data.train.path={folder / 'train.jsonl'}",
        f"data.dev.path={folder / 'dev.jsonl'}",
        *(f"benchmarks.{benchmark}.source.path={folder / 'test.jsonl'}" for benchmark in own.benchmarks),
        *(f"benchmarks.{benchmark}.decoding.max_new_tokens=4" for benchmark in own.benchmarks),
        "methods.seqkd.generation.decoding.max_new_tokens=4",
        *(f"methods.{method}.train.max_steps=1" for method in SIBLINGS),
    ]
    for prefix in ("", "teacher_finetune.") if own.teacher_finetune else ("",):
        changes += [f"{prefix}train.epochs=null", f"{prefix}train.max_steps={STEPS}", f"{prefix}train.elementwise=eager"]
        changes += [f"{prefix}validation.decoding.max_new_tokens=2"]
        changes += [] if SHAPES[name].bf16 else [f"{prefix}train.precision=fp32"]
    return changes


def write_inputs(shape: Shape, folder: Path) -> None:
    """Two random models of 16 dimensions, and rows enough for the largest batch."""
    # Heads with room to spare, as Qwen2.5's have: its tokenizer class adds a token to the tiny vocabulary.
    tiny.save(shape.family(layers=shape.teacher, width=16, vocab=304, seed=1), folder / "teacher")
    tiny.save(shape.family(layers=shape.student, width=16, vocab=304, seed=2), folder / "student")
    tiny.write_rows(folder / "train.jsonl", 64)
    tiny.write_rows(folder / "dev.jsonl", 2, seed=1)
    tiny.write_rows(folder / "test.jsonl", 2, seed=2)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Record what every optimiser step is given."""
    seen: list[Step] = []
    take = loop.optimizer_step

    def recorded(student: Any, teacher: Any, objective: Objective, micro: Any, optimizer: Any, **rest: Any) -> Any:
        group = optimizer.param_groups[0]
        seen.append(
            Step(
                tuple(len(batch.example_ids) for batch in micro), objective, student.lens.num_layers,
                None if teacher is None else teacher.source.num_layers, rest["max_grad_norm"], rest["autocast"],
                group["weight_decay"], group["betas"],
                frozenset(name for name, parameter in student.model.named_parameters() if parameter.requires_grad),
            )
        )  # fmt: skip
        return take(student, teacher, objective, micro, optimizer, **rest)

    monkeypatch.setattr(loop, "optimizer_step", recorded)
    return seen


def rates(artifact: Path) -> list[float]:
    records = [json.loads(line)["metrics"] for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    return [record["train/learning_rate"] for record in records if "train/learning_rate" in record]


@pytest.fixture(scope="module", params=SHAPES)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Every method of one file, trained for two steps."""
    name, folder = str(request.param), tmp_path_factory.mktemp("paper")
    write_inputs(SHAPES[name], folder)
    file = CONFIGS / f"{name}.yaml"
    plan = plan_experiment(load_experiment(file, reduced(name, folder)), folder / "runs")
    steps: dict[str, list[Step]] = {}
    found: dict[str, list[float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        if plan.finetune is not None:
            prepare.run(plan.data)
            found["teacher"] = rates(finetune_teacher.run(plan.finetune).path)
            steps["teacher"] = list(seen)
        stages.run_inputs(plan)
        for trial in plan.trials:
            if trial.train is not None:
                seen.clear()
                found[trial.method] = rates(train.run(trial.train).path)
                steps[trial.method] = list(seen)
    yield Ran(SHAPES[name], load_experiment(file), plan, steps, found)


def budgets(ran: Ran) -> dict[str, Training]:
    """Method → its budget in the file as it is."""
    own = {name: ran.published.training_of(name) for name in ran.published.methods}
    tuning = ran.published.teacher_finetune
    return own if tuning is None else {"teacher": tuning.train, **own}


def test_nothing_else_of_the_file_is_changed(ran: Ran) -> None:
    before, after = (
        flatten(experiment.model_dump(mode="json")) for experiment in (ran.published, ran.plan.experiment)
    )  # fmt: skip
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    reference = {"kind", "repo", "revision", "path", "file", "skip", "first"}
    execution = {"epochs", "max_steps", "elementwise", "max_new_tokens"} | (set() if ran.shape.bf16 else {"precision"})
    assert {path.rpartition(".")[2] for path in changed} <= reference | execution
    of_methods = {path for path in changed if path.startswith("methods.")}
    assert of_methods == {
        "methods.seqkd.generation.decoding.max_new_tokens",
        *(path for path in of_methods if path.split(".")[1] in SIBLINGS),
    }


def test_layers_are_those_of_the_published_models(ran: Ran) -> None:
    shape = ran.shape
    assert ran.plan.student.layers == shape.student
    for method, steps in ran.steps.items():
        assert {step.student_layers for step in steps} == {shape.teacher if method == "teacher" else shape.student}
        taught = method != "teacher" and ran.published.alpha_of(method) > 0
        assert {step.teacher_layers for step in steps} == {shape.teacher if taught else None}


def test_every_method_has_its_batches(ran: Ran) -> None:
    assert list(ran.steps) == list(budgets(ran))
    for method, budget in budgets(ran).items():
        expected = math.ceil(budget.batch_size / budget.micro_batch_size)
        for step in ran.steps[method]:
            assert (sum(step.rows), len(step.rows), max(step.rows)) == (
                budget.batch_size, expected, budget.micro_batch_size,
            )  # fmt: skip
        assert len(ran.steps[method]) == (1 if method in SIBLINGS else STEPS)


def test_every_method_has_its_schedule_and_optimiser(ran: Ran) -> None:
    for method, budget in budgets(ran).items():
        assert (budget.schedule, budget.warmup_steps) == ("cosine", 0)
        peak, floor = budget.learning_rates[0], budget.min_learning_rate
        halfway = (peak + floor) / 2  # cosine at the second of two steps
        assert ran.rates[method] == pytest.approx([peak, halfway][: len(ran.steps[method])], rel=1e-9)
        for step in ran.steps[method]:
            assert (step.weight_decay, step.betas, step.max_grad_norm) == (
                budget.weight_decay, budget.betas, budget.max_grad_norm,
            )  # fmt: skip
            assert budget.precision == "bf16" and step.autocast is (torch.bfloat16 if ran.shape.bf16 else None)
            adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in step.trained if ".lora_" in name}
            assert adapted == (set(budget.lora.target_modules) if budget.lora else set())
            assert all(".lora_" in name for name in step.trained) == (budget.lora is not None)


def test_every_method_has_its_objective(ran: Ran) -> None:
    for method, config in ran.published.methods.items():
        for step in ran.steps[method]:
            found = step.objective
            if isinstance(config, Sft | SeqKd):
                assert found == Objective(0.0)
                continue
            assert found.alpha == (1.0 if isinstance(config, DistillLens) else 0.5)
            assert found.alpha == ran.published.alpha_of(method)
            assert found.task == (config.task if isinstance(config, DistillLens | Mse) else TASK_OF_KIND[config.kind])
            assert (found.lens is not None) == isinstance(config, DistillLens)
            assert (found.features is not None) == isinstance(config, Mse)
            if isinstance(config, DistillLens):
                assert found.lens.pairs == tuple(map(tuple, config.lens.pairs.pairs))
                assert (found.lens.weight, found.lens.divergence) == (1.0, "jensen_shannon")
                assert (found.lens.mask_layout, found.lens.final_norm) == ("official", False)
            if isinstance(config, Mse):
                assert found.features.pairs == tuple(map(tuple, config.features.pairs.pairs))
                assert (found.features.positions, found.features.projection) == ("all", "teacher")


def test_official_masks_ask_the_teacher_online_and_other_methods_read_the_cache(ran: Ran) -> None:
    assert ran.plan.cache is not None and ran.plan.cache.dtype == "bfloat16"
    for method, config in ran.published.methods.items():
        states = stages.training(ran.plan, method).cache
        assert (states is None) == isinstance(config, Sft | SeqKd | DistillLens | Mse)


def test_the_student_is_decoded_by_the_published_protocol(ran: Ran) -> None:
    trial = next(trial for trial in ran.plan.trials if trial.method == "distilllens")
    first = trial.evaluations[0]
    prepare.run_benchmark(first.benchmark)
    artifact = evaluate.run(first, evaluate.load_subject(first.subject))
    protocol = evaluate.read_scores(artifact.path)["protocol"]
    published = ran.published.benchmarks[first.benchmark.name]
    assert protocol["seeds"] == published.seeds == [10, 20, 30, 40, 50]
    assert published.decoding is not None
    assert {**protocol["decoding"], "max_new_tokens": 256} == published.decoding.model_dump()
    assert artifact.manifest.counts["generations"] == 2 * len(published.seeds)
