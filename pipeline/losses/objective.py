"""The objective of every method: weighted terms on response positions.

L = (1 − α)·CE(labels, q) + α·[ D_task(p, q) + λ · mean over pairs of D_lens(p_l', q_l) + w · MSE(features) ]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.losses.divergences import at_least_float32
from pipeline.losses.elementwise import Backend
from pipeline.losses.fused import vocab_cross_entropy, vocab_divergence
from pipeline.losses.head import Head

IGNORE_INDEX = -100
LayerPair = tuple[int, int]
States = Callable[[int, Tensor], Tensor]
"""(layer, positions [N]) → states [N, d]; positions index the flattened [B·T] grid of the batch."""


@dataclass(frozen=True)
class LensTerm:
    """λ · mean over pairs of a divergence between lens distributions.

    Attributes:
        weight: λ.
        divergence: name in `pipeline.losses.divergences.DIVERGENCES`.
        pairs: (student layer, teacher layer).
        final_norm: apply each model's final norm to intermediate states first.
        mask_layout: "aligned", or "official" (hazard 1).
        token_fraction: share of the response positions that each pair compares, drawn anew for every pair, row and step; the
            estimate is unbiased, see `sampled_positions`.
        layer_weights: relative weight of each pair, at least one positive; they are scaled to mean 1. None weighs all alike.
    """

    weight: float
    divergence: str
    pairs: tuple[LayerPair, ...]
    final_norm: bool
    mask_layout: str
    token_fraction: float = 1.0
    layer_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class FeatureTerm:
    """w · mean squared error between projected states.

    Attributes:
        weight: w.
        pairs: (student layer, teacher layer).
        positions: "response", or "all" (hazard 3).
        projection: which side goes through the learned projection, "teacher" or "student".
    """

    weight: float
    pairs: tuple[LayerPair, ...]
    positions: str
    projection: str


@dataclass(frozen=True)
class Objective:
    """What a method minimises.

    Attributes:
        alpha: weight of the teacher's terms; 1 − alpha goes to the cross-entropy on labels.
        task: divergence on the final distributions, None for methods without a teacher.
        lens: the lens term, if any.
        features: the feature-matching term, if any.
    """

    alpha: float
    task: str | None = None
    lens: LensTerm | None = None
    features: FeatureTerm | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return self.task is not None or self.lens is not None or self.features is not None

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """Every layer pair that some term compares."""
        return (*(self.lens.pairs if self.lens else ()), *(self.features.pairs if self.features else ()))


@dataclass(frozen=True)
class Side:
    """One model as the objective sees it.

    Attributes:
        states: its states of the batch by layer and positions.
        head: its output head.
        norm: its final norm.
        last: index of its final, already normed, state.
    """

    states: States
    head: Head
    norm: Callable[[Tensor], Tensor]
    last: int

    def lens_states(self, layer: int, positions: Tensor, final_norm: bool) -> Tensor:
        """States [N, d] as the head gets them under the lens; the final state is never normed again (hazard 2)."""
        states = self.states(layer, positions)
        return self.norm(states) if final_norm and layer != self.last else states


@dataclass(frozen=True)
class Terms:
    """The loss of a micro-batch, in its share of the optimiser step.

    Attributes:
        total: scalar to call backward on.
        parts: detached unweighted terms by name ("ce", "task", "lens", "features"), same share.
    """

    total: Tensor
    parts: dict[str, Tensor]


def compute(
    objective: Objective,
    student: Side,
    teacher: Side | None,
    labels: Tensor,
    *,
    denominator: int,
    projection: nn.Module | None = None,
    backend: Backend = "eager",
    row_seeds: Sequence[int] = (),
) -> Terms:
    """Every term of one micro-batch, divided by the optimiser step's response tokens.

    Args:
        objective: the method.
        student: gradients flow into its states and head.
        teacher: no gradients; None only where the objective needs none.
        labels: [B, T], shifted; IGNORE_INDEX outside the response.
        denominator: response tokens of the whole optimiser step, over all micro-batches and processes, so that the sum
            of the micro-batches' losses is the mean over the step.
        projection: the learned projection of the feature term.
        backend: how the divergences' elementwise part runs, see `pipeline.losses.elementwise`.
        row_seeds: B seeds of the rows' token draws; read only where `token_fraction` is below 1.

    Raises:
        ValueError: a term needs a teacher or a projection that is not there.
    """
    positions = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    share = len(positions) / denominator if denominator else 0.0
    final = student.states(student.last, positions)
    parts: dict[str, Tensor] = {}
    if objective.alpha < 1:
        parts["ce"] = share * vocab_cross_entropy(final, student.head, labels.flatten()[positions])
    if objective.alpha > 0:
        parts |= _teacher_terms(
            objective, student, _required(teacher, "teacher"), labels, positions, final, share, projection, backend, row_seeds
        )
    weights = {
        "ce": 1 - objective.alpha,
        "task": objective.alpha,
        "lens": objective.alpha * objective.lens.weight if objective.lens else 0.0,
        "features": objective.alpha * objective.features.weight if objective.features else 0.0,
    }
    total = sum((weights[name] * value for name, value in parts.items()), torch.zeros((), device=labels.device))
    return Terms(total, {name: value.detach() for name, value in parts.items()})


def _teacher_terms(
    objective: Objective,
    student: Side,
    teacher: Side,
    labels: Tensor,
    positions: Tensor,
    final: Tensor,
    share: float,
    projection: nn.Module | None,
    backend: Backend,
    row_seeds: Sequence[int],
) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    if objective.task is not None:
        parts["task"] = share * vocab_divergence(
            final,
            student.head,
            teacher.states(teacher.last, positions),
            teacher.head,
            divergence=objective.task,
            backend=backend,
        )
    if objective.lens is not None:
        parts["lens"] = share * lens_divergence(objective.lens, student, teacher, labels, positions, backend, row_seeds)
    if objective.features is not None:
        parts["features"] = share * feature_error(
            objective.features, student, teacher, labels, positions, _required(projection, "projection")
        )
    return parts


def lens_divergence(
    term: LensTerm,
    student: Side,
    teacher: Side,
    labels: Tensor,
    positions: Tensor,
    backend: Backend = "eager",
    row_seeds: Sequence[int] = (),
) -> Tensor:
    """Mean over pairs and response tokens of the divergence between lens distributions, nats (eq. 7 of the paper).

    All pairs go through one pass: their rows are concatenated. With `layer_weights` the mean over pairs is a weighted one.
    """
    where, scale = _compared_positions(term, labels, positions, row_seeds)
    student_rows = [student.lens_states(layer, at, term.final_norm) for (layer, _), at in zip(term.pairs, where, strict=True)]
    teacher_rows = [teacher.lens_states(layer, at, term.final_norm) for (_, layer), at in zip(term.pairs, where, strict=True)]
    mean = vocab_divergence(
        torch.cat(student_rows),
        student.head,
        torch.cat(teacher_rows),
        teacher.head,
        divergence=term.divergence,
        weights=None if term.layer_weights is None else _row_weights(term.layer_weights, where),
        backend=backend,
    )
    return mean if scale == 1.0 else scale * mean


def _row_weights(layer_weights: Sequence[float], where: Sequence[Tensor]) -> Tensor:
    """[N] weight of every compared row: its pair's, with mean 1 over the pairs."""
    mean = sum(layer_weights) / len(layer_weights)
    rows = [torch.full((len(at),), weight / mean, device=at.device) for weight, at in zip(layer_weights, where, strict=True)]
    return torch.cat(rows)


def _compared_positions(
    term: LensTerm, labels: Tensor, positions: Tensor, row_seeds: Sequence[int]
) -> tuple[list[Tensor], float]:
    """Positions that each pair compares, and what their mean is multiplied by to estimate the mean over all positions."""
    if term.mask_layout == "official":
        return official_positions(labels, len(term.pairs)), 1.0
    if term.token_fraction == 1.0:
        return [positions] * len(term.pairs), 1.0
    where = sampled_positions(labels, len(term.pairs), term.token_fraction, row_seeds)
    expected = term.token_fraction * len(positions) * len(term.pairs)
    return where, sum(map(len, where)) / expected if expected else 1.0


def sampled_positions(labels: Tensor, pairs: int, fraction: float, row_seeds: Sequence[int]) -> list[Tensor]:
    """A random subset of the response positions for each pair, every position with the same probability `fraction`.

    Of a row's n response tokens a pair takes floor(fraction · n + u), u uniform in [0, 1), without replacement, so the sum over
    them divided by `fraction` has the full sum as its expectation, and so has its gradient (Horvitz–Thompson). A row's draw
    depends on its own seed alone: it is the same however the step is cut into micro-batches.

    Args:
        labels: [B, T]; IGNORE_INDEX outside the response.
        pairs: K.
        fraction: in (0, 1].
        row_seeds: B.

    Returns:
        K tensors of ascending flat positions.

    Raises:
        ValueError: there are not as many seeds as rows.
    """
    if len(row_seeds) != labels.shape[0]:
        raise ValueError(f"{len(row_seeds)} row seeds for {labels.shape[0]} rows; token_fraction below 1 needs one for each")
    response = (labels != IGNORE_INDEX).cpu()
    chosen: list[list[Tensor]] = [[] for _ in range(pairs)]
    for row, seed in enumerate(row_seeds):
        own = response[row].nonzero().squeeze(1) + row * labels.shape[1]
        generator = torch.Generator().manual_seed(seed)
        for taken in chosen:
            count = int(fraction * len(own) + float(torch.rand((), generator=generator)))
            taken.append(own[torch.randperm(len(own), generator=generator)[:count].sort().values])
    return [torch.cat(taken).to(labels.device) for taken in chosen]


def official_positions(labels: Tensor, pairs: int) -> list[Tensor]:
    """Positions that the published code compares for each pair (hazard 1).

    It stacks lens rows sample-major (row b·K + k) and tiles the mask layer-major, so row r is masked by sample r mod B.
    """
    response = labels != IGNORE_INDEX
    rows = torch.arange(labels.shape[0], device=labels.device)
    return [response[(rows * pairs + pair) % len(rows)].flatten().nonzero().squeeze(1) for pair in range(pairs)]


def feature_error(
    term: FeatureTerm, student: Side, teacher: Side, labels: Tensor, positions: Tensor, projection: nn.Module
) -> Tensor:
    """Mean squared error over pairs, positions and dimensions, one side through the projection."""
    at = positions if term.positions == "response" else torch.arange(labels.numel(), device=labels.device)
    errors = []
    for student_layer, teacher_layer in term.pairs:
        student_states, teacher_states = student.states(student_layer, at), teacher.states(teacher_layer, at)
        if term.projection == "teacher":
            teacher_states = projection(teacher_states)
        else:
            student_states = projection(student_states)
        # Without rows the mean would be NaN; the sum is a zero that still has a gradient.
        difference = at_least_float32(student_states - teacher_states).square()
        errors.append(difference.sum() / max(difference.numel(), 1))
    return torch.stack(errors).mean()


def new_projection(term: FeatureTerm, student_width: int, teacher_width: int) -> nn.Linear:
    """The learned projection: identity at the start where both models are equally wide, torch's default elsewhere."""
    source, target = (teacher_width, student_width) if term.projection == "teacher" else (student_width, teacher_width)
    projection = nn.Linear(source, target, bias=False)
    if source == target:
        nn.init.eye_(projection.weight)
    return projection


def teacher_layers(objective: Objective, last: int) -> tuple[int, ...]:
    """Teacher layers that the objective reads, ascending; `last` is the final state's index."""
    layers = {teacher for _, teacher in objective.pairs}
    return tuple(sorted(layers | {last} if objective.task is not None else layers))


def student_layers(objective: Objective, last: int) -> tuple[int, ...]:
    """Student layers that the objective reads, ascending; always with the final state."""
    return tuple(sorted({student for student, _ in objective.pairs} | {last}))


_T = TypeVar("_T")


def _required(value: _T | None, name: str) -> _T:
    if value is None:
        raise ValueError(f"this objective needs a {name}")
    return value
