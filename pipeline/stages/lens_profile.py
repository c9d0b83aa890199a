"""Stage: one student against its teacher at every mapped layer, on the dev rows, and token by token on one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.config.experiment import Experiment
from pipeline.config.methods import DistillLens, LensProfile, Pairs, UniformPairs
from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import read_encoded
from pipeline.evaluation.lens_profile import (
    LayerProfile,
    LensHeat,
    lens_profile,
    position_divergences,
    read_heat,
    read_profiles,
    write_heat,
    write_profiles,
)
from pipeline.evaluation.lens_view import token_text, visible
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

VERSION = 2
PROFILE, HEAT = "profile.json", "heat.json"
HEAT_TOKENS = 24
"""Response tokens of the heat map at most."""
_ENOUGH_TOKENS = 8
_MOST_CHARACTERS = 40


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
    """Profile the student and commit profile.json and heat.json.

    Args:
        plan: the profile.
        loaded: the student if it is in memory already.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        student = loaded or load_subject(plan.subject)
        teacher = cache.open_teacher(None, plan.teacher, choose_device())
        size = common_vocabulary(teacher.lens.head.size, student.model, len(student.tokenizer))
        lens, teacher_lens = logit_lens(student.model, size), narrowed(teacher, size).lens
        rows = read_encoded(plan.data.place.open().path / DEV)
        chosen = [rows[i] for i in range(min(plan.config.rows or len(rows), len(rows)))]
        last = (plan.initial.layers, teacher.source.num_layers)
        provenance = read_provenance(plan.initial.place.open().path)
        pairs = [*dict.fromkeys((*resolve_pairs(plan.pairs, *last, provenance, "evaluation.lens_profile"), last))]
        with progress(plan.place.label, len(chosen), "rows") as advance:
            layers = lens_profile(
                student.model, lens, teacher.source, teacher_lens, chosen, pairs, final_norm=plan.final_norm,
                batch_size=plan.config.batch_size, pad_token_id=pad_id(student.tokenizer), progress=advance,
            )  # fmt: skip
        write_profiles(folder / PROFILE, {plan.name: layers})
        row = heat_row(chosen)
        jsd = position_divergences(
            student.model, lens, teacher.source, teacher_lens, row, pairs,
            final_norm=plan.final_norm, pad_token_id=pad_id(student.tokenizer),
        )  # fmt: skip
        texts = (visible(token_text(student.tokenizer, token)) for token in row.input_ids[row.prompt_tokens :])
        tokens = tuple(text[:_MOST_CHARACTERS] for text in texts)
        write_heat(folder / HEAT, LensHeat(tokens, tuple(pairs), tuple(map(tuple, jsd.tolist()))))
        return {"rows": len(chosen), "tokens": layers[0].tokens, "pairs": len(layers)}

    return build(plan.place, work)


def read_profile(plan: LensProfilePlan) -> list[LayerProfile]:
    """The layers of a finished profile.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    (layers,) = read_profiles(plan.place.open().path / PROFILE).values()
    return layers


def read_profile_heat(plan: LensProfilePlan) -> LensHeat:
    """The heat map of a finished profile.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return read_heat(plan.place.open().path / HEAT)


def heat_row(rows: Sequence[EncodedExample]) -> EncodedExample:
    """The row of the heat map: the first with enough of a response, else the one with the longest, to its last shown token.

    It depends on the rows alone, so every student of an experiment is shown on the same one.
    """
    longest = max(rows, key=_response_tokens)
    row = next((row for row in rows if _response_tokens(row) >= _ENOUGH_TOKENS), longest)
    return replace(row, input_ids=row.input_ids[: row.prompt_tokens + HEAT_TOKENS])


def _response_tokens(row: EncodedExample) -> int:
    return len(row.input_ids) - row.prompt_tokens


def _lens_of(experiment: Experiment, student_layers: int) -> tuple[Pairs, bool]:
    """Pairs and final norm of the first method with a lens term; else evenly spaced pairs, as the paper's."""
    for method in experiment.methods.values():
        if isinstance(method, DistillLens):
            return method.lens.pairs, method.lens.final_norm
    return UniformPairs(count=max(1, min(UniformPairs().count, student_layers - 1))), False
