"""Padding, shifting and masking: the only place that does any of the three (hazards 4 and 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.examples import EncodedExample

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """A training batch, padded on the right.

    Attributes:
        example_ids: B ids.
        input_ids: [B, T] token ids; the last token of each row is only ever a label.
        attention_mask: [B, T] 1 for real tokens.
        labels: [B, T], already shifted: labels[b, t] is the token after input_ids[b, t], IGNORE_INDEX outside the response.
        response_positions: [N] row-major flat indices into [B·T] where labels is a response token.
        response_counts: response tokens of each row, in row order; sums to N.
    """

    example_ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    response_positions: Tensor
    response_counts: tuple[int, ...]

    @property
    def response_labels(self) -> Tensor:
        """[N] next tokens at the response positions."""
        return self.labels.flatten()[self.response_positions]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(
            example_ids=self.example_ids,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            response_positions=self.response_positions.to(device, non_blocking=True),
            response_counts=self.response_counts,
        )


def batches_by_length(examples: Sequence[EncodedExample], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Batches of rows of similar length, shortest first, ties by id: the order of everything that only measures."""
    ordered = sorted(examples, key=lambda row: (len(row.input_ids), row.id))
    return (collate(ordered[start : start + batch_size], pad_token_id) for start in range(0, len(ordered), batch_size))


def collate(examples: Sequence[EncodedExample], pad_token_id: int, pad_to: int | None = None) -> Batch:
    """Pad on the right, shift labels once, mask prompt and padding by position, never by token id (hazard 6).

    Args:
        examples: B rows, each with at least one response token.
        pad_token_id: any valid id; padding is masked by length, so it may equal eos.
        pad_to: fixed T; None pads to the longest row.

    Returns:
        The batch, T = longest row − 1 unless `pad_to` is given.

    Raises:
        ValueError: `pad_to` is too short, or a row lacks prompt or response tokens.
    """
    longest = max(len(example.input_ids) for example in examples) - 1
    width = longest if pad_to is None else pad_to
    if width < longest:
        raise ValueError(f"pad_to={pad_to} is shorter than the longest row ({longest} input tokens)")
    shape = (len(examples), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for row, example in enumerate(examples):
        if not 0 < example.prompt_tokens < len(example.input_ids):
            raise ValueError(
                f"example {example.id}: {example.prompt_tokens} prompt tokens of {len(example.input_ids)}; "
                "a row needs at least one prompt and one response token"
            )
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        length, first = len(ids) - 1, example.prompt_tokens - 1
        input_ids[row, :length] = ids[:-1]
        attention_mask[row, :length] = 1
        labels[row, first:length] = ids[1 + first :]
    response = labels != IGNORE_INDEX
    return Batch(
        example_ids=tuple(example.id for example in examples),
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        response_positions=response.flatten().nonzero().squeeze(1),
        response_counts=tuple(response.sum(dim=1).tolist()),
    )
