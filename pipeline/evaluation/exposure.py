"""Exposure bias: how much faster a student's errors add up on its own prefixes than on the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import Batch, batches_by_length
from pipeline.data.examples import EncodedExample
from pipeline.errors import ModelError
from pipeline.losses.divergences import forward_kl
from pipeline.losses.elementwise import keep_freed_blocks, row_chunks
from pipeline.losses.fused import default_chunk_tokens
from pipeline.losses.head import check_same_size
from pipeline.models.lens import LogitLens
from pipeline.teacher.online import layer_states


@dataclass(frozen=True)
class ExposureBias:
    """Excess accumulated error after each generation length l; the tuples run along `lengths`.

    Attributes:
        lengths: l, generated tokens.
        excess_percent: ExAccErr(l) = (R(l) − l·ε(l)) / (l·ε(l)) · 100; 0 without exposure bias. None where the student
            makes no error on the oracle's prefixes.
        regret: R(l), nats: error accumulated over l steps on the student's own prefixes, mean over rows.
        oracle_error: ε(l), nats per step: the same on the oracle's prefixes, divided by l.
        student_alive: share of the student's responses with at least l tokens, 0–1.
        oracle_alive: share of the oracle's responses with at least l tokens, 0–1.
        rows: prompt × sample pairs.
    """

    lengths: tuple[int, ...]
    excess_percent: tuple[float | None, ...]
    regret: tuple[float, ...]
    oracle_error: tuple[float, ...]
    student_alive: tuple[float, ...]
    oracle_alive: tuple[float, ...]
    rows: int


@torch.no_grad()
def excess_accumulated_error(
    teacher: PreTrainedModel,
    teacher_lens: LogitLens,
    student: PreTrainedModel,
    student_lens: LogitLens,
    student_sequences: Sequence[Sequence[int]],
    oracle_sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    batch_size: int,
    pad_token_id: int,
    *,
    chunk_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExposureBias:
    """ExAccErr of a student that was to imitate a teacher.

    With p the teacher and q the student, the error of step t on a response y is KL(p(· | x, y_<t) ‖ q(· | x, y_<t)), nats.

        R(l)     = mean over rows of the sum over t = 1 … l, y written by the student
        l · ε(l) = the same sum, y written by the oracle (the teacher, or the reference)

    A response of n tokens has n steps, the first on the bare prompt, the last where its end token was chosen. A response
    that has ended makes no further error, so all its later steps add 0. A response that was cut says nothing about what
    would have followed, so no length should lie beyond the limit that the responses were decoded with. Where
    `student_alive` and `oracle_alive` differ much, ExAccErr measures lengths as much as errors.

    Deviations from the lineage's evaluate_exposure_bias.py, which reports l = 16 with one sample per prompt. The direction of
    the divergence, the zeros after the end, the mean over rows and the ratio of the means are the same. But there:

    - The logits are cut one position too late: the step on the bare prompt is missing and, in a response that was cut, one
      beyond its last token counts. Its l-th value thus spans steps 2 … l + 1 of ours.
    - Padding is found by token id. Where the end token is the padding token (GPT-2) that hides it from the models, which
      does not matter to the steps before it (hazard 6).
    - Several samples of a prompt are averaged over those still unfinished at a step (plus 0.001 of one); here each sample is
      a row of its own, and ended ones count as 0.
    - Logits are half precision where the models are; here divergences are float32 and sums float64.

    No more than a chunk of either model's logits is held at a time.

    Args:
        teacher: p, in evaluation mode.
        teacher_lens: its lens; the lenses' heads compare the same number of vocabulary entries.
        student: q, in evaluation mode.
        student_lens: its lens.
        student_sequences: prompt and response tokens, one row per prompt and sample, the response written by the student.
        oracle_sequences: the same prompts in the same order, with the oracle's responses.
        prompt_lengths: leading prompt tokens of each row.
        lengths: l, ascending.
        batch_size: rows in a forward pass.
        pad_token_id: any valid id.
        chunk_tokens: steps whose logits are held at a time; None takes `default_chunk_tokens`.
        progress: told how many more sequences are done, of the student's and the oracle's together.

    Raises:
        ModelError: a model's logits are not finite numbers.
        ValueError: no rows, rows that do not match, a row without a response token, lengths that are not ascending from 1
            up, heads of different sizes, or a model in training mode.

    Source: %ExAccErr of Arora et al. (2022), "Why Exposure Bias Matters: An Imitation Learning Perspective of Error
    Accumulation in Language Generation"; used by Gu et al. (2024), MiniLLM, and Ko et al. (2024), DistiLLM.
    """
    _check_rows(student_sequences, oracle_sequences, prompt_lengths)
    _check_lengths(lengths, batch_size)
    _check_models(teacher, teacher_lens, student, student_lens)
    pair = _Pair(teacher, teacher_lens, student, student_lens, chunk_tokens or default_chunk_tokens(student_lens.head.size))
    keep_freed_blocks()
    on_student, on_oracle = (
        _accumulate(pair, _rows(sequences, prompt_lengths, lengths[-1]), lengths[-1], batch_size, pad_token_id, progress)
        for sequences in (student_sequences, oracle_sequences)
    )
    at = [length - 1 for length in lengths]
    regret, oracle = ([float(steps.errors[index]) for index in at] for steps in (on_student, on_oracle))
    return ExposureBias(
        lengths=tuple(lengths),
        excess_percent=tuple((r - o) / o * 100 if o > 0 else None for r, o in zip(regret, oracle, strict=True)),
        regret=tuple(regret),
        oracle_error=tuple(error / length for error, length in zip(oracle, lengths, strict=True)),
        student_alive=tuple(float(on_student.alive[index]) for index in at),
        oracle_alive=tuple(float(on_oracle.alive[index]) for index in at),
        rows=len(prompt_lengths),
    )


@dataclass(frozen=True)
class _Pair:
    """Two models and how many positions' logits they may hold."""

    teacher: PreTrainedModel
    teacher_lens: LogitLens
    student: PreTrainedModel
    student_lens: LogitLens
    chunk: int

    def errors(self, batch: Batch) -> Tensor:
        """KL(p ‖ q) [N] float64 on the CPU, at the batch's response positions."""
        p = _final_states(self.teacher, self.teacher_lens, batch)
        q = _final_states(self.student, self.student_lens, batch)
        nats = [
            forward_kl(self.teacher_lens.head.logits(p[chunk]).to(q.device), self.student_lens.head.logits(q[chunk]))
            for chunk in row_chunks(0, len(q), self.chunk)
        ]
        errors = torch.cat(nats).double().cpu()
        if not bool(errors.isfinite().all()):
            raise ModelError(
                "the teacher's or the student's next-token logits are not finite numbers: the model has diverged, its exposure "
                "bias cannot be measured; train it with a lower learning rate"
            )
        return errors


@dataclass(frozen=True)
class _Steps:
    """After each step 1 … l: accumulated error and share of unfinished responses, means over rows, [l] float64."""

    errors: Tensor
    alive: Tensor


def _accumulate(
    pair: _Pair,
    rows: Sequence[EncodedExample],
    longest: int,
    batch_size: int,
    pad_token_id: int,
    progress: Callable[[int], None] | None,
) -> _Steps:
    errors, alive = torch.zeros(2, longest, dtype=torch.float64)
    for batch in batches_by_length(rows, batch_size, pad_token_id):
        steps = torch.cat([torch.arange(count) for count in batch.response_counts])
        errors.index_add_(0, steps, pair.errors(batch))
        alive += torch.bincount(steps, minlength=longest)
        if progress is not None:
            progress(len(batch.example_ids))
    return _Steps(errors.cumsum(0) / len(rows), alive / len(rows))


def _rows(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], longest: int) -> list[EncodedExample]:
    """Rows for `collate`, cut after the last step that is looked at."""
    return [
        EncodedExample(str(index), tuple(sequence[: prompt + longest]), prompt)
        for index, (sequence, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True))
    ]


def _final_states(model: PreTrainedModel, lens: LogitLens, batch: Batch) -> Tensor:
    moved = batch.to(model.device)
    states = layer_states(model, moved, [lens.num_layers], moved.response_positions)[lens.num_layers]
    return states.to(lens.head.weight.dtype)


def _check_rows(
    student_sequences: Sequence[Sequence[int]], oracle_sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> None:
    counts = {len(student_sequences), len(oracle_sequences), len(prompt_lengths)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"{len(student_sequences)} student sequences, {len(oracle_sequences)} oracle sequences and "
            f"{len(prompt_lengths)} prompt lengths; give the same number of each, at least one"
        )
    for index, (own, oracle, prompt) in enumerate(zip(student_sequences, oracle_sequences, prompt_lengths, strict=True)):
        if tuple(own[:prompt]) != tuple(oracle[:prompt]):
            raise ValueError(f"row {index}: the student's and the oracle's sequence begin with different prompts")


def _check_lengths(lengths: Sequence[int], batch_size: int) -> None:
    if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"lengths are {list(lengths)}; give at least one, ascending, each at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def _check_models(teacher: PreTrainedModel, teacher_lens: LogitLens, student: PreTrainedModel, student_lens: LogitLens) -> None:
    if teacher.training or student.training:
        raise ValueError("a model is in training mode, so dropout would add errors; put both into evaluation mode first")
    check_same_size(student_lens.head, teacher_lens.head)
