"""Stage 3: one student trained by one method with one training seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.config.experiment import Experiment
from pipeline.config.methods import DistillLens, MethodConfig, SeqKd, Sft, Training, Validation
from pipeline.data.tokenize import EncodedDataset, read_encoded
from pipeline.errors import ConfigError
from pipeline.evaluation.generate import DecodingProtocol
from pipeline.losses.objective import Objective, new_projection
from pipeline.models import load
from pipeline.models.lens import check_vocabulary_sizes, logit_lens
from pipeline.stages import cache
from pipeline.stages.cache import CachePlan
from pipeline.stages.fit import METRICS, Fit, Make, Subject, check_launch, fit, fit_recipe
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.objectives import Method, build_objective, planned_objective, reads_all_positions
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import TRAIN, TrainingDataPlan
from pipeline.stages.seqkd import SeqKdPlan
from pipeline.stages.student import StudentPlan, read_provenance
from pipeline.training.device import choose_device
from pipeline.training.loop import total_steps
from pipeline.training.on_policy import OnPolicy
from pipeline.training.step import Student, Teacher

VERSION = 2


@dataclass(frozen=True)
class Inputs:
    """What every run of an experiment starts from.

    Attributes:
        data: tokenised rows.
        student: the untrained student.
        teacher: the teacher, fine-tuned if the experiment says so.
        cache: the teacher's states; None asks the teacher online.
        generations: method → the teacher's responses that it trains on.
    """

    data: TrainingDataPlan
    student: StudentPlan
    teacher: ModelPlan
    cache: CachePlan | None
    generations: Mapping[str, SeqKdPlan]


@dataclass(frozen=True)
class TrainPlan:
    """One training run.

    Attributes:
        place: its artifact.
        method: name in the experiment.
        config: the method.
        alpha: α of this method.
        seed: training seed.
        training: the budget.
        validation: how the best checkpoint is chosen.
        data, student, teacher: the inputs.
        cache: where the teacher's states come from; None asks the teacher online.
        generated: the teacher's responses, for a method that trains on them instead of the references.
    """

    place: Place
    method: str
    config: MethodConfig
    alpha: float
    seed: int
    training: Training
    validation: Validation
    data: TrainingDataPlan
    student: StudentPlan
    teacher: ModelPlan
    cache: CachePlan | None
    generated: SeqKdPlan | None

    def as_method(self) -> Method:
        """The method with what its objective depends on."""
        return Method(
            self.method, self.config, self.alpha, self.student.layers, self.teacher.config().num_hidden_layers,
            pruned=self.student.config.kind == "pruned",
        )  # fmt: skip


_PLANS = TypeAdapter(TrainPlan)


def plan_training(experiment: Experiment, method: str, seed: int, inputs: Inputs, root: Path) -> TrainPlan:
    """Plan one run. Its fingerprint covers this method's settings and no other's.

    Raises:
        ConfigError: a mapped layer does not exist, the method asks a cache for what no cache holds, or several processes
            cannot train it or not here.
    """
    config = experiment.methods[method]
    alpha, training = experiment.alpha_of(method), experiment.training_of(method)
    _check_processes(method, config, training)
    uses_teacher = alpha > 0
    states = inputs.cache if uses_teacher and not reads_all_positions(config) else None
    generated = inputs.generations.get(method)
    recipe = {
        "method": config.model_dump(mode="json", exclude={"alpha", "train", "generation"}, exclude_none=True),
        "alpha": alpha,
        "seed": seed,
        **fit_recipe(training, experiment.validation),
        "teacher_states": None if not uses_teacher else states.dtype if states else "online",
    }
    if isinstance(config, DistillLens) and config.lens.mask_layout == "official":
        # The published tiling mixes the rows of one forward pass (hazard 1), so their number changes the result.
        recipe["micro_batch_size"] = training.micro_batch_size or training.batch_size
    upstream = {"prepare": inputs.data.place.fingerprint, "student": inputs.student.place.fingerprint}
    if uses_teacher:
        upstream["teacher"] = inputs.teacher.digest
    if generated is not None:
        upstream["seqkd"] = generated.place.fingerprint
    where = place(root, "train", VERSION, f"train {method} s{seed}", recipe, upstream)
    plan = TrainPlan(
        where, method, config, alpha, seed, training, experiment.validation, inputs.data, inputs.student, inputs.teacher,
        states, generated,
    )  # fmt: skip
    planned_objective(plan.as_method())
    if not where.path.exists():
        check_launch(training, "train")
    return plan


def _check_processes(name: str, config: MethodConfig, training: Training) -> None:
    """Refuse what several processes would change: rows that share a forward pass, and sampling from a sharded student."""
    launch = training.launch
    if launch.processes == 1:
        return
    if reads_all_positions(config):
        where = "lens.mask_layout: official" if isinstance(config, DistillLens) else "features.positions: all"
        raise ConfigError(
            f"methods.{name}.{where} depends on which rows share a forward pass, and train.launch.processes "
            f"{launch.processes} divides them; set one of the two otherwise"
        )
    if launch.strategy != "ddp" and getattr(config, "on_policy", None) is not None:
        raise ConfigError(
            f"methods.{name}.on_policy samples from the whole student, which no process has with train.launch.strategy "
            f"{launch.strategy}; set it to ddp, or remove on_policy"
        )


def run(plan: TrainPlan, follow: Callable[[Path], Any] | None = None) -> Artifact:
    """Train and commit the selected weights with metrics.jsonl and summary.json.

    Args:
        plan: the run.
        follow: told the path of metrics.jsonl before training starts (a tracker reads it from there).

    Raises:
        DataError, ModelError, Stopped, TrainingError: see `pipeline.stages.fit.fit`.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        if follow is not None:
            follow(folder / METRICS)
        return fit(*_fit_of(plan), folder)

    return build(plan.place, work)


def unpack(plan: str) -> tuple[Fit, Make]:
    """What a run trains and how, from its plan as JSON; for processes that train together."""
    return _fit_of(_PLANS.validate_json(plan))


def _fit_of(plan: TrainPlan) -> tuple[Fit, Make]:
    device = choose_device()
    student_folder = plan.student.place.open().path
    objective = build_objective(plan.as_method(), read_provenance(student_folder))
    tokenizer = load.load_tokenizer(student_folder)

    @functools.cache
    def teacher() -> Teacher | None:
        return cache.open_teacher(plan.cache, plan.teacher, device) if objective.needs_teacher else None

    def subject(model: PreTrainedModel) -> Subject:
        asked = teacher()
        common = None if asked is None else common_vocabulary(asked.lens.head.size, model, len(tokenizer))
        projection = _projection(plan, objective, model.config.hidden_size, plan.teacher.config().hidden_size)
        student = Student(model, logit_lens(model, common), None if projection is None else projection.to(device))
        return Subject(student, None if asked is None else narrowed(asked, common), objective, tokenizer)

    prepared = plan.data.place.open().path
    rows = training_rows(plan)
    training = _equal_steps(plan.training, len(read_encoded(prepared / TRAIN)))
    job = Fit(
        plan.place.label, plan.seed, training, plan.validation, student_folder, rows, prepared,
        plan.data.config.max_tokens, _on_policy(plan), __name__, _PLANS.dump_json(plan).decode(),
    )  # fmt: skip
    return job, subject


def _on_policy(plan: TrainPlan) -> OnPolicy | None:
    wanted = None if isinstance(plan.config, Sft | SeqKd) else plan.config.on_policy
    if wanted is None:
        return None
    return OnPolicy(wanted.fraction, DecodingProtocol(**wanted.decoding.model_dump()), plan.seed)


def training_rows(plan: TrainPlan) -> EncodedDataset:
    """The rows that a run trains on: the references, or the teacher's responses for sequence-level KD."""
    return read_encoded((plan.generated or plan.data).place.open().path / TRAIN)


def _equal_steps(training: Training, rows: int) -> Training:
    """The budget in optimiser steps, so that rows that a method leaves out do not shorten its training."""
    steps = total_steps(rows, training.batch_size, training.epochs, training.max_steps)
    return training.model_copy(update={"epochs": None, "max_steps": steps})


def common_vocabulary(teacher_size: int, student: PreTrainedModel, tokenizer_size: int) -> int:
    """Entries that both models have and the tokenizer uses.

    Raises:
        ModelError: the vocabularies differ.
    """
    head = student.get_output_embeddings()
    return check_vocabulary_sizes(teacher_size, head.weight.shape[0], tokenizer_size)


def narrowed(teacher: Teacher, vocab_size: int | None) -> Teacher:
    """The teacher with a head of the first `vocab_size` entries (hazard 7)."""
    return Teacher(teacher.source, replace(teacher.lens, head=replace(teacher.lens.head, vocab_size=vocab_size)))


def _projection(plan: TrainPlan, objective: Objective, student_width: int, teacher_width: int) -> torch.nn.Linear | None:
    if objective.features is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return new_projection(objective.features, student_width, teacher_width)
