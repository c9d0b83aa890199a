"""The output head as the losses see it: tensors and two scalars, no model class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale · (W h + b)).

    Attributes:
        weight: W, [V, d].
        bias: b, [V] or None.
        scale: multiplies the logits (Cohere `logit_scale`; Granite 1 / `logits_scaling`).
        softcap: C in C · tanh(z / C) (Gemma 2 `final_logit_softcapping`) or None.
        vocab_size: V', only the first V' rows are compared (padded heads, hazard 7); None means all V.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    @property
    def size(self) -> int:
        """Number of vocabulary entries that take part."""
        return self.vocab_size if self.vocab_size is not None else self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V'] of hidden states [..., d], in hidden's dtype."""
        bias = None if self.bias is None else self.bias[: self.size]
        logits = torch.nn.functional.linear(hidden, self.weight[: self.size], bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def check_same_size(student: Head, teacher: Head) -> None:
    """Make sure that two heads compare the same vocabulary entries (hazard 7).

    Raises:
        ValueError: they do not.
    """
    if student.size != teacher.size:
        raise ValueError(
            f"the student's head compares {student.size} vocabulary entries, the teacher's {teacher.size}; "
            "set vocab_size of both heads to the size of the vocabulary that they share"
        )
