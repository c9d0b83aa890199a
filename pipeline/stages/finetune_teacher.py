"""Stage: the teacher fine-tuned on the training rows, before anything else uses it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.config.experiment import TeacherFinetune
from pipeline.data.tokenize import read_encoded
from pipeline.losses.objective import Objective
from pipeline.models import load
from pipeline.models.lens import logit_lens
from pipeline.stages.fit import Fit, Make, Subject, check_launch, fit, fit_recipe
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import TRAIN, TrainingDataPlan
from pipeline.training.step import Student

VERSION = 1


@dataclass(frozen=True)
class FinetunePlan:
    """The teacher's fine-tuning.

    Attributes:
        place: its artifact.
        config: the budget.
        base: the teacher as it comes.
        data: the rows.
    """

    place: Place
    config: TeacherFinetune
    base: ModelPlan
    data: TrainingDataPlan

    @property
    def teacher(self) -> ModelPlan:
        """The fine-tuned teacher."""
        return replace(self.base, tuned=self.place)


_PLANS = TypeAdapter(FinetunePlan)


def plan_finetuning(config: TeacherFinetune, base: ModelPlan, data: TrainingDataPlan, root: Path) -> FinetunePlan:
    """Plan the fine-tuning.

    Raises:
        ConfigError: this machine cannot run as many processes.
    """
    recipe = {"seed": config.train.seeds[0], **fit_recipe(config.train, config.validation)}
    upstream = {"model": base.digest, "prepare": data.place.fingerprint}
    where = place(root, "teacher", VERSION, "fine-tune teacher", recipe, upstream)
    if not where.path.exists():
        check_launch(config.train, "teacher_finetune.train")
    return FinetunePlan(where, config, base, data)


def run(plan: FinetunePlan) -> Artifact:
    """Train the teacher by cross-entropy on the references, and commit the selected weights and metrics.jsonl.

    Raises:
        DataError, ModelError, Stopped, TrainingError: see `pipeline.stages.fit.fit`.
    """
    return build(plan.place, lambda folder: fit(*_fit_of(plan), folder))


def unpack(plan: str) -> tuple[Fit, Make]:
    """What a fine-tuning trains and how, from its plan as JSON; for processes that train together."""
    return _fit_of(_PLANS.validate_json(plan))


def _fit_of(plan: FinetunePlan) -> tuple[Fit, Make]:
    tokenizer = load.load_tokenizer(plan.data.tokenizer.folder())

    def subject(model: PreTrainedModel) -> Subject:
        return Subject(Student(model, logit_lens(model)), None, Objective(alpha=0.0), tokenizer)

    prepared = plan.data.place.open().path
    training = plan.config.train
    job = Fit(
        plan.place.label, training.seeds[0], training, plan.config.validation, plan.base.folder(),
        read_encoded(prepared / TRAIN), prepared, plan.data.config.max_tokens, None,
        __name__, _PLANS.dump_json(plan).decode(),
    )  # fmt: skip
    return job, subject
