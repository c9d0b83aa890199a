"""A method's configuration becomes the objective that training minimises, as soon as its layers can be known."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.methods import (
    TASK_OF_KIND,
    DistillLens,
    ExplicitPairs,
    FirstPairs,
    LastPairs,
    MethodConfig,
    Mse,
    Pairs,
    ProvenancePairs,
    UniformPairs,
)
from pipeline.errors import ConfigError
from pipeline.losses.objective import FeatureTerm, LayerPair, LensTerm, Objective, teacher_layers
from pipeline.models import layers as layer_maps


@dataclass(frozen=True)
class Method:
    """A method as one run uses it, with everything that its objective depends on.

    Attributes:
        name: in the experiment, for messages.
        config: its settings.
        alpha: α of this run.
        student_layers: L_S.
        teacher_layers: L_T.
        pruned: whether the student has a provenance.
    """

    name: str
    config: MethodConfig
    alpha: float
    student_layers: int
    teacher_layers: int
    pruned: bool


def planned_objective(method: Method) -> Objective | None:
    """The objective as far as it is known before the student exists: None if its pairs follow the student's provenance.

    Raises:
        ConfigError: a mapped layer does not exist.
    """
    if isinstance(_pairs_config(method.config), ProvenancePairs):
        if not method.pruned:
            raise ConfigError(
                f"methods.{method.name}: provenance pairs need a pruned student, this one has no provenance; set student.kind "
                "to pruned, or choose other pairs"
            )
        return None
    return build_objective(method, None)


def build_objective(method: Method, provenance: list[int] | None) -> Objective:
    """Flatten the method's configuration into the objective.

    Args:
        method: the method.
        provenance: teacher layer of each student layer 0 … L_S; None for students that were not pruned.

    Raises:
        ConfigError: a mapped layer does not exist.
    """
    config = method.config
    if method.alpha == 0:
        return Objective(alpha=0.0)
    if isinstance(config, DistillLens):
        lens = config.lens
        term = LensTerm(
            lens.weight, lens.divergence, _method_pairs(lens.pairs, method, provenance, "lens"), lens.final_norm,
            lens.mask_layout, lens.token_fraction, None if lens.layer_weights is None else tuple(lens.layer_weights),
        )  # fmt: skip
        return Objective(method.alpha, config.task, lens=term)
    if isinstance(config, Mse):
        features = config.features
        pairs = _method_pairs(features.pairs, method, provenance, "features")
        return Objective(
            method.alpha, config.task, features=FeatureTerm(features.weight, pairs, features.positions, features.projection)
        )
    return Objective(method.alpha, TASK_OF_KIND[config.kind])


def reads_all_positions(config: MethodConfig) -> bool:
    """Whether a method reads teacher states outside the response, which no cache holds."""
    if isinstance(config, DistillLens):
        return config.lens.mask_layout == "official"
    return isinstance(config, Mse) and config.features.positions == "all"


def layers_to_cache(method: Method) -> set[int]:
    """Teacher layers that a run with this method may read.

    Where the pairs follow a provenance that is not known yet, a student layer comes from one of two teacher layers,
    before the dropped block or after it: both are kept.
    """
    last = method.teacher_layers
    objective = planned_objective(method)
    if objective is not None:
        return set(teacher_layers(objective, last))
    pairs = _pairs_config(method.config)
    assert isinstance(pairs, ProvenancePairs)
    dropped = last - method.student_layers
    before = [
        layer for layer, _ in layer_maps.uniform_pairs(pairs.count, method.student_layers, last, f"methods.{method.name}")
    ]
    return {*before, *(layer + dropped for layer in before), last}


def resolve_pairs(pairs: Pairs, student: int, teacher: int, provenance: list[int] | None, what: str) -> tuple[LayerPair, ...]:
    """The pairs of a choice, for L_S = `student` and L_T = `teacher` layers; `what` is the setting, for messages.

    Raises:
        ConfigError: a layer does not exist, or pairs follow a provenance that the student does not have.
    """
    if isinstance(pairs, UniformPairs):
        return layer_maps.uniform_pairs(pairs.count, student, teacher, what)
    if isinstance(pairs, FirstPairs):
        return layer_maps.first_pairs(pairs.count, student, teacher, what)
    if isinstance(pairs, LastPairs):
        return layer_maps.last_pairs(pairs.count, student, teacher, what)
    if isinstance(pairs, ExplicitPairs):
        return layer_maps.check_pairs(pairs.pairs, student, teacher, what)
    if provenance is None:
        raise ConfigError(f"{what}: provenance pairs need a pruned student; set student.kind to pruned, or other pairs")
    return layer_maps.provenance_pairs(pairs.count, provenance, what)


def _method_pairs(pairs: Pairs, method: Method, provenance: list[int] | None, where: str) -> tuple[LayerPair, ...]:
    what = f"methods.{method.name}.{where}.pairs"
    return resolve_pairs(pairs, method.student_layers, method.teacher_layers, provenance, what)


def _pairs_config(config: MethodConfig) -> Pairs | None:
    if isinstance(config, DistillLens):
        return config.lens.pairs
    return config.features.pairs if isinstance(config, Mse) else None
