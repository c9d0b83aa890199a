"""How far a student is from its teacher at every mapped layer, and on which side, through both models' logit lenses."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.artifacts import write_text_atomically
from pipeline.data.collate import Batch, batches_by_length
from pipeline.data.examples import EncodedExample
from pipeline.errors import ArtifactError
from pipeline.losses.divergences import at_least_float32, jensen_shannon_terms, log_probs, probs
from pipeline.losses.elementwise import keep_freed_blocks, row_chunks
from pipeline.losses.fused import default_chunk_tokens
from pipeline.losses.head import check_same_size
from pipeline.models.layers import LayerPair, check_pairs
from pipeline.models.lens import LogitLens
from pipeline.teacher.online import layer_states
from pipeline.teacher.signal import TeacherSource

_CPU_BLOCK_BYTES = 2**20
_LOG_2 = math.log(2.0)
_ROUNDING = 1e-3
_jensen_shannon = jensen_shannon_terms()


@dataclass(frozen=True)
class LayerProfile:
    """Teacher p at `teacher_layer` against student q at `student_layer`: means over response tokens, nats and shares.

    c = q / p of a vocabulary entry says how the student errs there: over-confident above 1, under-confident below 1. Every
    entry adds ½·p·g(c) ≥ 0 to the Jensen-Shannon divergence (g(c) = c·log c − (1+c)·log((1+c)/2)), so it splits into two
    halves. Mass is counted where it is misplaced, on the side that has it: the student's where it is over-confident, the
    teacher's where the student is under-confident. Both shares are 0 where the models agree and 1 where they have no
    token in common, and exchanging the models exchanges them.

    Attributes:
        student_layer: l, 0 (embeddings) … L_S.
        teacher_layer: l', 0 (embeddings) … L_T.
        final: both are final states, so p and q are the models' predictions.
        tokens: response tokens that the means are over.
        jsd: Jensen-Shannon divergence, nats, at most log 2; jsd_over + jsd_under.
        jsd_over: its part from entries with c > 1.
        jsd_under: its part from entries with c < 1.
        teacher_entropy: entropy of p, nats.
        student_entropy: entropy of q, nats.
        over_confident_mass: sum of q over entries with c > 2; 0–1.
        under_confident_mass: sum of p over entries with c < ½; 0–1.
        top1_agreement: share of tokens where both models have the same most probable entry; 0–1.
    """

    student_layer: int
    teacher_layer: int
    final: bool
    tokens: int
    jsd: float
    jsd_over: float
    jsd_under: float
    teacher_entropy: float
    student_entropy: float
    over_confident_mass: float
    under_confident_mass: float
    top1_agreement: float


_MEASURES = tuple(field.name for field in fields(LayerProfile))[4:]


@dataclass(frozen=True)
class LensHeat:
    """Jensen-Shannon divergence to the teacher at every mapped layer and response token of one row.

    Attributes:
        tokens: texts of the response's tokens as people read them, at least one.
        pairs: (student layer, teacher layer), at least one.
        jsd: jsd[i][j], nats, 0 to log 2: of the distributions at pairs[i] that predict tokens[j].

    Raises:
        ValueError: numbers are missing or cannot be divergences.
    """

    tokens: tuple[str, ...]
    pairs: tuple[LayerPair, ...]
    jsd: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.tokens or not self.pairs or [len(line) for line in self.jsd] != [len(self.tokens)] * len(self.pairs):
            raise ValueError("not one divergence for each pair of layers and each token")
        if not all(-_ROUNDING <= value <= _LOG_2 + _ROUNDING for line in self.jsd for value in line):
            raise ValueError("a divergence is not 0 to log 2")


@torch.no_grad()
def lens_profile(
    student: PreTrainedModel,
    student_lens: LogitLens,
    teacher_source: TeacherSource,
    teacher_lens: LogitLens,
    rows: Sequence[EncodedExample],
    pairs: Sequence[LayerPair],
    *,
    final_norm: bool,
    batch_size: int,
    pad_token_id: int,
    chunk_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[LayerProfile]:
    """Profile a student on rows that it was not trained on, by teacher forcing, at response positions only.

    No more than a chunk of either model's logits is held at a time; how rows are batched and chunked changes nothing but
    rounding.

    Args:
        student: the student; in evaluation mode while this runs.
        student_lens: its lens; the lenses' heads compare the same number of vocabulary entries.
        teacher_source: the teacher's states, online or cached (a cache must hold every teacher layer of `pairs`).
        teacher_lens: the teacher's lens.
        rows: tokenised rows, at least one.
        pairs: (student layer, teacher layer); (L_S, L_T) compares the predictions.
        final_norm: apply each model's final norm to intermediate states first; never to final ones (hazard 2).
        batch_size: rows in a forward pass.
        pad_token_id: any valid id.
        chunk_tokens: response tokens whose logits are held at a time; None takes `default_chunk_tokens`.
        progress: told how many more rows are done.

    Returns:
        One profile per pair, in the order of `pairs`; measures in float32, summed in float64.

    Raises:
        ConfigError: a layer of `pairs` does not exist.
        ValueError: there are no rows, or the heads compare different vocabulary sizes.
    """
    pairs = check_pairs(pairs, student_lens.num_layers, teacher_source.num_layers, "pairs")
    _check(rows, student_lens, teacher_lens)
    chunk = chunk_tokens or default_chunk_tokens(student_lens.head.size)
    totals, tokens = torch.zeros(len(pairs), len(_MEASURES), dtype=torch.float64), 0
    keep_freed_blocks()
    with _evaluating(student):
        for cpu_batch in batches_by_length(rows, batch_size, pad_token_id):
            batch = cpu_batch.to(student.device)
            states = _states(student, teacher_source, batch, pairs)
            for index, ((student_layer, teacher_layer), (p, q)) in enumerate(zip(pairs, states, strict=True)):
                teacher_rows = _Rows(teacher_lens, teacher_layer, p, final_norm)
                totals[index] += _sums(teacher_rows, _Rows(student_lens, student_layer, q, final_norm), chunk)
            tokens += len(batch.response_positions)
            if progress is not None:
                progress(len(batch.example_ids))
    last = (student_lens.num_layers, teacher_source.num_layers)
    return [
        LayerProfile(*pair, pair == last, tokens, **dict(zip(_MEASURES, sums.tolist(), strict=True)))
        for pair, sums in zip(pairs, totals / tokens, strict=True)
    ]


@torch.no_grad()
def position_divergences(
    student: PreTrainedModel,
    student_lens: LogitLens,
    teacher_source: TeacherSource,
    teacher_lens: LogitLens,
    row: EncodedExample,
    pairs: Sequence[LayerPair],
    *,
    final_norm: bool,
    pad_token_id: int,
) -> Tensor:
    """What `lens_profile` takes the mean of, for one row: `LayerProfile.jsd` at each of its response tokens.

    Args:
        student: the student; in evaluation mode while this runs.
        student_lens: its lens; the lenses' heads compare the same number of vocabulary entries.
        teacher_source: the teacher's states.
        teacher_lens: the teacher's lens.
        row: one tokenised row.
        pairs: (student layer, teacher layer).
        final_norm: see `lens_profile`.
        pad_token_id: any valid id.

    Returns:
        Jensen-Shannon divergences [pairs, response tokens], nats, float32.

    Raises:
        ConfigError: a layer of `pairs` does not exist.
        ValueError: the heads compare different vocabulary sizes.
    """
    pairs = check_pairs(pairs, student_lens.num_layers, teacher_source.num_layers, "pairs")
    _check([row], student_lens, teacher_lens)
    chunk, jsd = default_chunk_tokens(student_lens.head.size), _MEASURES.index("jsd")
    with _evaluating(student):
        (batch,) = batches_by_length([row], 1, pad_token_id)
        states = _states(student, teacher_source, batch.to(student.device), pairs)
        lines = []
        for (student_layer, teacher_layer), (p, q) in zip(pairs, states, strict=True):
            teacher_rows = _Rows(teacher_lens, teacher_layer, p, final_norm)
            blocks = _blocks(teacher_rows, _Rows(student_lens, student_layer, q, final_norm), chunk)
            lines.append(torch.cat([block[jsd] for block in blocks]).float().cpu())
    return torch.stack(lines)


def write_profiles(path: Path, profiles: Mapping[str, Sequence[LayerProfile]]) -> None:
    """Write the profiles of several subjects (`untrained`, `distilllens s10`, …) as JSON: subject → list of layers."""
    content = {subject: [asdict(layer) for layer in layers] for subject, layers in profiles.items()}
    write_text_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_profiles(path: Path) -> dict[str, list[LayerProfile]]:
    """Read what `write_profiles` wrote.

    Raises:
        ArtifactError: the file is missing or holds something else.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(subject): [LayerProfile(**layer) for layer in layers] for subject, layers in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: holds no lens profiles ({error}); remove its folder and run again to rebuild it"
        ) from None


def write_heat(path: Path, heat: LensHeat) -> None:
    """Write a heat map as JSON: tokens, pairs, jsd."""
    write_text_atomically(path, json.dumps(asdict(heat), ensure_ascii=False, allow_nan=False) + "\n")


def read_heat(path: Path) -> LensHeat:
    """Read what `write_heat` wrote.

    Raises:
        ArtifactError: the file is missing or holds something else.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        tokens, pairs, jsd = (content[name] for name in ("tokens", "pairs", "jsd"))
        return LensHeat(
            tuple(map(str, tokens)),
            tuple((int(student), int(teacher)) for student, teacher in pairs),
            tuple(tuple(map(float, line)) for line in jsd),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path}: holds no lens heat map ({error}); remove its folder and run again to rebuild it"
        ) from None


@dataclass(frozen=True)
class _Rows:
    """States [N, d] of one layer on their way to logits."""

    lens: LogitLens
    layer: int
    states: Tensor
    final_norm: bool

    def logits(self, rows: slice) -> Tensor:
        # States of a cache are float32 whatever the head is.
        states = self.states[rows].to(self.lens.head.weight.dtype)
        return at_least_float32(self.lens.logits(states, self.layer, self.final_norm))


def _sums(p: _Rows, q: _Rows, chunk: int) -> Tensor:
    """Each measure's sum over the rows, [measures] float64."""
    total = torch.zeros(len(_MEASURES), dtype=torch.float64)
    for block in _blocks(p, q, chunk):
        total += block.sum(-1, dtype=torch.float64).cpu()
    return total


def _blocks(p: _Rows, q: _Rows, chunk: int) -> Iterator[Tensor]:
    """Each measure of a few rows at a time, [measures, n]."""
    for rows in row_chunks(0, p.states.shape[0], chunk):
        p_logits, q_logits = p.logits(rows), q.logits(rows)
        for block in row_chunks(0, p_logits.shape[0], _block_rows(p_logits)):
            yield _measures(log_probs(p_logits[block]), log_probs(q_logits[block]))


def _measures(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Each measure of `_MEASURES` by row, [measures, n], from log-probabilities [n, V]."""
    jsd, student_part = _jensen_shannon(log_p, log_q)
    # It is symmetric, so exchanging the arguments gives the teacher's part of every entry: together ½·p·g(c).
    _, teacher_part = _jensen_shannon(log_q, log_p)
    entries = student_part.add_(teacher_part)
    log_c, p, q = log_q - log_p, probs(log_p), probs(log_q)
    return torch.stack(
        [
            jsd,
            (entries * (log_c > 0)).sum(-1),
            (entries * (log_c < 0)).sum(-1),
            -(p * log_p).sum(-1),
            -(q * log_q).sum(-1),
            (q * (log_c > _LOG_2)).sum(-1),
            (p * (log_c < -_LOG_2)).sum(-1),
            (log_p.argmax(-1) == log_q.argmax(-1)).to(jsd.dtype),
        ]
    )


def _states(
    student: PreTrainedModel, source: TeacherSource, batch: Batch, pairs: Sequence[LayerPair]
) -> list[tuple[Tensor, Tensor]]:
    """(teacher states, student states) [N, d] of each pair at the batch's response positions."""
    at = batch.response_positions
    own = layer_states(student, batch, sorted({layer for layer, _ in pairs}), at)
    signal = source.signal(batch, sorted({layer for _, layer in pairs}))
    return [(signal.states(teacher_layer, at), own[student_layer]) for student_layer, teacher_layer in pairs]


def _block_rows(logits: Tensor) -> int:
    """Rows whose dozen temporaries stay in a CPU's cache; elsewhere the whole chunk."""
    if logits.device.type != "cpu":
        return logits.shape[0]
    return max(1, _CPU_BLOCK_BYTES // (logits.shape[1] * logits.element_size()))


def _check(rows: Sequence[EncodedExample], student: LogitLens, teacher: LogitLens) -> None:
    if not rows:
        raise ValueError("no rows to profile a student on; give at least one")
    check_same_size(student.head, teacher.head)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
