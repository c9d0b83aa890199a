"""Stage: one student against its teacher at every mapped layer, on the dev rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.config.experiment import Experiment
from pipeline.config.methods import DistillLens, LensProfile, Pairs, UniformPairs
from pipeline.data.tokenize import read_encoded
from pipeline.evaluation.lens_profile import LayerProfile, lens_profile, read_profiles, write_profiles
from pipeline.models.lens import logit_lens
from pipeline.progress import progress
from pipeline.stages import cache
from pipeline.stages.evaluate import LoadedModel, load_subject
from pipeline.stages.fit import pad_id
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.objectives import resolve_pairs
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import DEV, TrainingDataPlan
from pipeline.stages.student import StudentPlan, read_provenance
from pipeline.stages.train import TrainPlan, common_vocabulary, narrowed
from pipeline.training.device import choose_device

VERSION = 1
PROFILE = "profile.json"


@dataclass(frozen=True)
class LensProfilePlan:
    """One student's profile.

    Attributes:
        place: its artifact.
        name: of the trial.
        subject: the student, trained or not.
        initial: the untrained student, whose provenance the pairs may follow.
        teacher, data: the inputs.
        pairs, final_norm: how layers are compared.
        config: rows and batch size.
    """

    place: Place
    name: str
    subject: StudentPlan | TrainPlan
    initial: StudentPlan
    teacher: ModelPlan
    data: TrainingDataPlan
    pairs: Pairs
    final_norm: bool
    config: LensProfile


def plan_profile(
    experiment: Experiment,
    name: str,
    subject: StudentPlan | TrainPlan,
    initial: StudentPlan,
    teacher: ModelPlan,
    data: TrainingDataPlan,
    root: Path,
) -> LensProfilePlan | None:
    """Plan the profile of a trial; None where the experiment asks for none.

    Raises:
        ConfigError: a mapped layer does not exist.
    """
    config = experiment.evaluation.lens_profile
    if config is None:
        return None
    pairs, final_norm = _lens_of(experiment, initial.layers)
    recipe = {"pairs": pairs.model_dump(mode="json"), "final_norm": final_norm, "rows": config.rows}
    upstream = {
        "model": subject.place.fingerprint,
        "student": initial.place.fingerprint,
        "teacher": teacher.digest,
        "prepare": data.place.fingerprint,
    }
    where = place(root, "lens_profile", VERSION, f"lens profile of {name}", recipe, upstream)
    return LensProfilePlan(where, name, subject, initial, teacher, data, pairs, final_norm, config)


def run(plan: LensProfilePlan, loaded: LoadedModel | None = None) -> Artifact:
    """Profile the student and commit profile.json.

    Args:
        plan: the profile.
        loaded: the student if it is in memory already.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        student = loaded or load_subject(plan.subject)
        teacher = cache.open_teacher(None, plan.teacher, choose_device())
        size = common_vocabulary(teacher.lens.head.size, student.model, len(student.tokenizer))
        rows = read_encoded(plan.data.place.open().path / DEV)
        chosen = [rows[i] for i in range(min(plan.config.rows or len(rows), len(rows)))]
        last = (plan.initial.layers, teacher.source.num_layers)
        provenance = read_provenance(plan.initial.place.open().path)
        pairs = resolve_pairs(plan.pairs, *last, provenance, "evaluation.lens_profile")
        with progress(plan.place.label, len(chosen), "rows") as advance:
            layers = lens_profile(
                student.model, logit_lens(student.model, size), teacher.source, narrowed(teacher, size).lens, chosen,
                list(dict.fromkeys((*pairs, last))), final_norm=plan.final_norm, batch_size=plan.config.batch_size,
                pad_token_id=pad_id(student.tokenizer), progress=advance,
            )  # fmt: skip
        write_profiles(folder / PROFILE, {plan.name: layers})
        return {"rows": len(chosen), "tokens": layers[0].tokens, "pairs": len(layers)}

    return build(plan.place, work)


def read_profile(plan: LensProfilePlan) -> list[LayerProfile]:
    """The layers of a finished profile.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    (layers,) = read_profiles(plan.place.open().path / PROFILE).values()
    return layers


def _lens_of(experiment: Experiment, student_layers: int) -> tuple[Pairs, bool]:
    """Pairs and final norm of the first method with a lens term; else evenly spaced pairs, as the paper's."""
    for method in experiment.methods.values():
        if isinstance(method, DistillLens):
            return method.lens.pairs, method.lens.final_norm
    return UniformPairs(count=max(1, min(UniformPairs().count, student_layers - 1))), False
