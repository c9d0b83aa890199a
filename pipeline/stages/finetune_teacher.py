"""Stage: the teacher fine-tuned on the training rows, before anything else uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.config.experiment import TeacherFinetune
from pipeline.data.tokenize import read_encoded
from pipeline.losses.objective import Objective
from pipeline.models import load
from pipeline.models.lens import logit_lens
from pipeline.stages.fit import Fit, Subject, fit, fit_recipe
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


def plan_finetuning(config: TeacherFinetune, base: ModelPlan, data: TrainingDataPlan, root: Path) -> FinetunePlan:
    """Plan the fine-tuning."""
    recipe = {"seed": config.train.seeds[0], **fit_recipe(config.train, config.validation)}
    upstream = {"model": base.digest, "prepare": data.place.fingerprint}
    return FinetunePlan(place(root, "teacher", VERSION, "fine-tune teacher", recipe, upstream), config, base, data)


def run(plan: FinetunePlan) -> Artifact:
    """Train the teacher by cross-entropy on the references, and commit the selected weights and metrics.jsonl.

    Raises:
        DataError, ModelError, TrainingError: see `pipeline.training.loop.train`.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        tokenizer = load.load_tokenizer(plan.data.tokenizer.folder())

        def subject(model: PreTrainedModel) -> Subject:
            return Subject(Student(model, logit_lens(model)), None, Objective(alpha=0.0), tokenizer)

        prepared = plan.data.place.open().path
        training = plan.config.train
        job = Fit(
            plan.place.label, training.seeds[0], training, plan.config.validation, plan.base.folder(),
            read_encoded(prepared / TRAIN), prepared, plan.data.config.max_tokens,
        )  # fmt: skip
        return fit(job, subject, folder)

    return build(plan.place, work)
