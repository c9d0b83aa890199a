"""A plain DistillLens step, the reference of the benchmarks: every formula as it stands, every row padded to 512 tokens.

As the published code does it: both models with full logits and all hidden states, the head applied to the states of every
position, divergences over every position with the mask at the end, gradients by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import IGNORE_INDEX, Batch


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """½·KL(p || m) + ½·KL(q || m) [...] of logits [..., V], m = (p + q) / 2."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.5 * (log_q.exp() * (log_q - log_m)).sum(-1)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(q || p) [...] of logits [..., V]."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def plain_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Reverse KL on the final logits plus the mean over pairs of the JSD of lens logits, mean over response tokens."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        taught = teacher(**inputs, output_hidden_states=True, use_cache=False)
    found = student(**inputs, output_hidden_states=True, use_cache=False)
    mask = (batch.labels != IGNORE_INDEX).float()
    loss = (reverse_kl(taught.logits, found.logits) * mask).sum() / mask.sum()
    student_states = torch.stack([found.hidden_states[layer] for layer, _ in pairs], dim=1)
    teacher_states = torch.stack([taught.hidden_states[layer] for _, layer in pairs], dim=1)
    with torch.no_grad():
        teacher_logits = teacher.get_output_embeddings()(teacher_states)
    divergence = jensen_shannon(teacher_logits, student.get_output_embeddings()(student_states))
    lens_mask = mask.unsqueeze(1).expand_as(divergence)
    return loss + (divergence * lens_mask).sum() / lens_mask.sum()


def plain_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    pairs: Sequence[tuple[int, int]],
    optimizer: torch.optim.Optimizer,
) -> float:
    """One optimiser step; returns the loss."""
    loss = plain_loss(student, teacher, batch, pairs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
