"""Stage 3: one student trained by one method with one training seed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Artifact, write_text_atomically
from pipeline.config.experiment import Experiment
from pipeline.config.methods import (
    TASK_OF_KIND,
    DistillLens,
    ExplicitPairs,
    MethodConfig,
    Mse,
    Pairs,
    ProvenancePairs,
    Training,
    UniformPairs,
    Validation,
)
from pipeline.data.tokenize import EncodedDataset, read_encoded, read_prompts
from pipeline.errors import ConfigError
from pipeline.evaluation.dev import dev_loss, dev_rouge
from pipeline.evaluation.generate import DecodingProtocol
from pipeline.losses.objective import FeatureTerm, LayerPair, LensTerm, Objective, new_projection, teacher_layers
from pipeline.models import layers as layer_maps
from pipeline.models import load
from pipeline.models.lens import check_vocabulary_sizes, logit_lens
from pipeline.progress import progress
from pipeline.stages import cache
from pipeline.stages.cache import CachePlan
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import DEV, DEV_PROMPTS, TRAIN, TrainingDataPlan
from pipeline.stages.student import StudentPlan, read_provenance
from pipeline.training.device import autocast_dtype, choose_device
from pipeline.training.loop import Settings, train
from pipeline.training.step import Student, Teacher

log = logging.getLogger(__name__)
VERSION = 1
MODEL, METRICS, SUMMARY = "model", "metrics.jsonl", "summary.json"


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


def plan_training(
    experiment: Experiment,
    method: str,
    seed: int,
    data: TrainingDataPlan,
    student: StudentPlan,
    teacher: ModelPlan,
    states: CachePlan | None,
    root: Path,
) -> TrainPlan:
    """Plan one run. Its fingerprint covers this method's settings and no other's.

    Raises:
        ConfigError: a mapped layer does not exist, or the method asks a cache for what no cache holds.
    """
    config = experiment.methods[method]
    own_alpha = getattr(config, "alpha", None)
    alpha = experiment.alpha if own_alpha is None else own_alpha
    alpha = 0.0 if config.kind == "sft" else alpha
    uses_teacher = alpha > 0
    states = states if uses_teacher and not reads_all_positions(config) else None
    recipe = {
        "method": config.model_dump(mode="json", exclude={"alpha"}),
        "alpha": alpha,
        "seed": seed,
        # How the same mathematics is carried out is left out: it changes nothing that a result may depend on.
        "training": experiment.train.model_dump(
            mode="json", exclude={"seeds", "micro_batch_size", "checkpoint_every", "elementwise"}
        ),
        "autocast": str(autocast_dtype(experiment.train.precision, choose_device())),
        "validation": experiment.validation.model_dump(mode="json", exclude={"batch_size"}),
        "teacher_states": None if not uses_teacher else states.dtype if states else "online",
    }
    upstream = {"prepare": data.place.fingerprint, "student": student.place.fingerprint}
    if uses_teacher:
        upstream["teacher"] = teacher.digest
    where = place(root, "train", VERSION, f"train {method} s{seed}", recipe, upstream)
    plan = TrainPlan(
        where, method, config, alpha, seed, experiment.train, experiment.validation, data, student, teacher, states
    )
    planned_objective(plan)
    return plan


def run(plan: TrainPlan, follow: Callable[[Path], Any] | None = None) -> Artifact:
    """Train and commit the selected weights with metrics.jsonl and summary.json.

    Args:
        plan: the run.
        follow: told the path of metrics.jsonl before training starts (a tracker reads it from there).

    Raises:
        DataError, ModelError, TrainingError: see `pipeline.training.loop.train`.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        device = choose_device()
        student_folder = plan.student.place.open().path
        model = load.load_model(student_folder, device=device)
        tokenizer = load.load_tokenizer(student_folder)
        objective = build_objective(plan, read_provenance(student_folder), plan.teacher.config().num_hidden_layers)
        teacher, vocab_size = _teacher(plan, objective, model, len(tokenizer), device)
        projection = _projection(plan, objective, model.config.hidden_size, plan.teacher.config().hidden_size)
        student = Student(model, logit_lens(model, vocab_size), None if projection is None else projection.to(device))
        rows = read_encoded(plan.data.place.open().path / TRAIN)
        if follow is not None:
            follow(folder / METRICS)
        with progress(plan.place.label, _total_steps(plan.training, len(rows)), "steps") as advance:

            def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
                advance(1, f"loss {metrics['train/loss']:.3f}")

            summary = train(
                student, teacher, objective, rows, _settings(plan, device), pad_token_id=_pad_id(tokenizer), folder=folder,
                validate=lambda: _validate(plan, student, tokenizer), on_step=on_step,
                save_model=lambda target: _save(model, tokenizer, target),
            )  # fmt: skip
        write_text_atomically(folder / SUMMARY, json.dumps(asdict(summary)))
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return asdict(summary)

    return build(plan.place, work)


def planned_objective(plan: TrainPlan) -> Objective | None:
    """The objective as far as it is known before the student exists: None if its pairs follow the student's provenance.

    Raises:
        ConfigError: a mapped layer does not exist.
    """
    pairs = _pairs_config(plan.config)
    if isinstance(pairs, ProvenancePairs):
        if plan.student.config.kind != "pruned":
            raise ConfigError(
                f"methods.{plan.method}: provenance pairs need a pruned student, this one is {plan.student.config.kind}"
            )
        return None
    return build_objective(plan, None, plan.teacher.config().num_hidden_layers)


def build_objective(plan: TrainPlan, provenance: list[int] | None, teacher_layers: int) -> Objective:
    """Flatten the method's configuration into the objective.

    Raises:
        ConfigError: a mapped layer does not exist.
    """
    config = plan.config
    what = f"methods.{plan.method}"

    def resolve(pairs: Pairs, where: str) -> tuple[LayerPair, ...]:
        return _resolve_pairs(pairs, plan.student.layers, teacher_layers, provenance, f"{what}.{where}.pairs")

    if plan.alpha == 0:
        return Objective(alpha=0.0)
    if isinstance(config, DistillLens):
        lens = config.lens
        term = LensTerm(
            lens.weight, lens.divergence, resolve(lens.pairs, "lens"), lens.final_norm, lens.mask_layout, lens.token_fraction
        )
        return Objective(plan.alpha, config.task, lens=term)
    if isinstance(config, Mse):
        features = config.features
        error = FeatureTerm(features.weight, resolve(features.pairs, "features"), features.positions, features.projection)
        return Objective(plan.alpha, config.task, features=error)
    return Objective(plan.alpha, TASK_OF_KIND[config.kind])


def reads_all_positions(config: MethodConfig) -> bool:
    """Whether a method reads teacher states outside the response, which no cache holds."""
    if isinstance(config, DistillLens):
        return config.lens.mask_layout == "official"
    return isinstance(config, Mse) and config.features.positions == "all"


def layers_to_cache(plan: TrainPlan, teacher_last: int) -> set[int]:
    """Teacher layers that this run may read; `teacher_last` is the index of the final state.

    Where the pairs follow a provenance that is not known yet, a student layer comes from one of two teacher layers,
    before the dropped block or after it: both are kept.
    """
    objective = planned_objective(plan)
    if objective is not None:
        return set(teacher_layers(objective, teacher_last))
    pairs = _pairs_config(plan.config)
    assert isinstance(pairs, ProvenancePairs)
    dropped = teacher_last - plan.student.layers
    before = [
        layer for layer, _ in layer_maps.uniform_pairs(pairs.count, plan.student.layers, teacher_last, f"methods.{plan.method}")
    ]
    return {*before, *(layer + dropped for layer in before), teacher_last}


def _resolve_pairs(
    pairs: Pairs, student_layers: int, teacher_layers: int, provenance: list[int] | None, what: str
) -> tuple[LayerPair, ...]:
    if isinstance(pairs, UniformPairs):
        return layer_maps.uniform_pairs(pairs.count, student_layers, teacher_layers, what)
    if isinstance(pairs, ExplicitPairs):
        return layer_maps.check_pairs(pairs.pairs, student_layers, teacher_layers, what)
    if provenance is None:
        raise ConfigError(f"{what}: provenance pairs need a pruned student")
    return layer_maps.provenance_pairs(pairs.count, provenance, what)


def _pairs_config(config: MethodConfig) -> Pairs | None:
    if isinstance(config, DistillLens):
        return config.lens.pairs
    return config.features.pairs if isinstance(config, Mse) else None


def _teacher(
    plan: TrainPlan, objective: Objective, student: Any, tokenizer_size: int, device: torch.device
) -> tuple[Teacher | None, int | None]:
    """The teacher as the objective needs it, and the number of vocabulary entries that both models share."""
    if not objective.needs_teacher:
        return None, None
    source, lens = cache.open_teacher(plan.cache, plan.teacher, device)
    common = check_vocabulary_sizes(lens.head.size, student.get_output_embeddings().weight.shape[0], tokenizer_size)
    return Teacher(source, replace(lens, head=replace(lens.head, vocab_size=common))), common


def _projection(plan: TrainPlan, objective: Objective, student_width: int, teacher_width: int) -> torch.nn.Linear | None:
    if objective.features is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return new_projection(objective.features, student_width, teacher_width)


def _settings(plan: TrainPlan, device: torch.device) -> Settings:
    training = plan.training
    return Settings(
        seed=plan.seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        learning_rate=training.learning_rate,
        min_learning_rate=training.min_learning_rate,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        betas=training.betas,
        max_grad_norm=training.max_grad_norm,
        autocast=autocast_dtype(training.precision, device),
        checkpoint_every=training.checkpoint_every,
        validate_every=plan.validation.every_steps,
        select=plan.validation.select,
        backend=training.elementwise,
    )


def _validate(plan: TrainPlan, student: Student, tokenizer: Any) -> dict[str, float]:
    folder = plan.data.place.path
    validation = plan.validation
    rows: EncodedDataset = read_encoded(folder / DEV)
    prompts = list(read_prompts(folder / DEV_PROMPTS))[: validation.rows]
    chosen = [rows[i] for i in range(min(validation.rows or len(rows), len(rows)))]
    scores = {"dev/loss": dev_loss(student.model, student.lens, chosen, validation.batch_size, _pad_id(tokenizer))}
    if validation.select == "rouge_l":
        scores["dev/rouge_l"] = dev_rouge(
            student.model,
            tokenizer,
            prompts,
            DecodingProtocol(**validation.decoding.model_dump()),
            validation.seed,
            validation.batch_size,
        )
    return scores


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _total_steps(training: Training, rows: int) -> int:
    return training.max_steps or -(-int((training.epochs or 1) * rows) // training.batch_size)
