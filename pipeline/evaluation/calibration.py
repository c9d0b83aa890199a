"""How far a model's confidence in its next token is from its accuracy, on reference responses (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import batches_by_length
from pipeline.data.examples import EncodedExample
from pipeline.errors import ModelError
from pipeline.losses.divergences import at_least_float32, log_probs
from pipeline.losses.elementwise import keep_freed_blocks, row_chunks
from pipeline.losses.fused import default_chunk_tokens
from pipeline.models.lens import LogitLens
from pipeline.teacher.online import layer_states


@dataclass(frozen=True)
class Bin:
    """Response tokens of similar confidence: a point of the reliability diagram, in percent.

    Attributes:
        low: lowest confidence, exclusive.
        high: highest confidence, inclusive.
        confidence: mean probability of the most probable token; None in an empty bin.
        accuracy: share of tokens where the most probable token is the reference's; None in an empty bin.
        count: response tokens.
    """

    low: float
    high: float
    confidence: float | None
    accuracy: float | None
    count: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of the final next-token predictions over response tokens.

    Attributes:
        ece: expected calibration error, percent: Σ_b (count_b / tokens) · |accuracy_b − confidence_b|.
        nll: mean negative log-likelihood of the reference's tokens, nats.
        top1_accuracy: share of tokens where the most probable token is the reference's, percent.
        confidence: mean probability of the most probable token, percent.
        tokens: response tokens.
        bins: of equal width, in ascending order.
    """

    ece: float
    nll: float
    top1_accuracy: float
    confidence: float
    tokens: int
    bins: tuple[Bin, ...]


@torch.no_grad()
def calibration(
    model: PreTrainedModel,
    lens: LogitLens,
    rows: Sequence[EncodedExample],
    batch_size: int,
    pad_token_id: int,
    bins: int = 15,
    *,
    chunk_tokens: int | None = None,
) -> Calibration:
    """Expected calibration error with equal-width bins, Guo et al. 2017, "On Calibration of Modern Neural Networks", Eq. 3.

    The prediction at a response position is the most probable next token after the reference's own prefix. No more than a
    chunk of logits is held at a time; how rows are batched and chunked changes nothing but rounding.

    Args:
        model: a causal language model, in evaluation mode.
        lens: its lens; the vocabulary entries that its head leaves out take no part.
        rows: tokenised rows that the model was not trained on, at least one.
        batch_size: rows in a forward pass.
        pad_token_id: any valid id.
        bins: number of bins, 15 as in the paper.
        chunk_tokens: response tokens whose logits are held at a time; None takes `default_chunk_tokens`.

    Returns:
        Measures in float32, summed in float64.

    Raises:
        ModelError: the model's logits are not finite numbers.
        ValueError: there are no rows, `batch_size` or `bins` is below 1, a label is outside the head's vocabulary, or the
            model is in training mode.
    """
    _check(model, rows, batch_size, bins)
    chunk = chunk_tokens or default_chunk_tokens(lens.head.size)
    sums, nll = torch.zeros(bins, 3, dtype=torch.float64), 0.0
    keep_freed_blocks()
    for cpu_batch in batches_by_length(rows, batch_size, pad_token_id):
        batch = cpu_batch.to(model.device)
        states = layer_states(model, batch, [lens.num_layers], batch.response_positions)[lens.num_layers]
        predictions = _predictions(states, lens, batch.response_labels, chunk)
        sums += _bin_sums(predictions, bins)
        nll += float(predictions.nll.sum())
    return _summary(sums, nll)


@dataclass(frozen=True)
class _Predictions:
    """By response token, [N] float64 on the CPU."""

    confidence: Tensor
    correct: Tensor
    nll: Tensor


def _predictions(states: Tensor, lens: LogitLens, labels: Tensor, chunk: int) -> _Predictions:
    if int(labels.max()) >= lens.head.size:
        raise ValueError(f"label {int(labels.max())} is outside the head's vocabulary of {lens.head.size} entries")
    parts: list[Tensor] = []
    for rows in row_chunks(0, states.shape[0], chunk):
        log_p = log_probs(at_least_float32(lens.logits(states[rows], lens.num_layers)))
        best, token = log_p.max(-1)
        correct = (token == labels[rows]).to(best.dtype)
        nll = -log_p.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
        parts.append(torch.stack([best.exp(), correct, nll]).cpu().double())
    found = _Predictions(*torch.cat(parts, dim=1))
    if not bool(found.confidence.isfinite().all()):
        raise ModelError(
            "the model's next-token logits on the reference responses are not finite numbers: it has diverged, "
            "its calibration cannot be measured; train it with a lower learning rate"
        )
    return found


def _bin_sums(predictions: _Predictions, bins: int) -> Tensor:
    """Sums of confidence and accuracy, and the number of tokens, of each bin: [bins, 3] float64."""
    # In range: `log_probs` is never above 0, and the most probable of V entries has at least 1 / V.
    index = (predictions.confidence * bins).ceil().long() - 1
    values = torch.stack([predictions.confidence, predictions.correct, torch.ones_like(predictions.correct)], dim=1)
    return torch.zeros(bins, 3, dtype=torch.float64).index_add_(0, index, values)


def _summary(sums: Tensor, nll: float) -> Calibration:
    confidence, correct, tokens = sums.sum(0).tolist()
    gaps = (sums[:, 1] - sums[:, 0]).abs()
    return Calibration(
        ece=100 * float(gaps.sum()) / tokens,
        nll=nll / tokens,
        top1_accuracy=100 * correct / tokens,
        confidence=100 * confidence / tokens,
        tokens=int(tokens),
        bins=tuple(_bin(index, len(sums), *values) for index, values in enumerate(sums.tolist())),
    )


def _bin(index: int, bins: int, confidence: float, correct: float, count: float) -> Bin:
    return Bin(
        low=100 * index / bins,
        high=100 * (index + 1) / bins,
        confidence=100 * confidence / count if count else None,
        accuracy=100 * correct / count if count else None,
        count=int(count),
    )


def _check(model: PreTrainedModel, rows: Sequence[EncodedExample], batch_size: int, bins: int) -> None:
    if not rows:
        raise ValueError("no rows to measure calibration on; give at least one")
    for name, value in (("batch_size", batch_size), ("bins", bins)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if model.training:
        raise ValueError(
            "the model is in training mode, so dropout would change its confidence; put it into evaluation mode first"
        )
