"""Choosing the next token: repeated n-grams, top-p, and sampling whose noise does not depend on the batch."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 256


class SeenNgrams:
    """The n-grams of one sequence, and which next tokens would repeat one (`no_repeat_ngram_size` of transformers)."""

    def __init__(self, size: int, tokens: Iterable[int] = ()) -> None:
        self._size = size
        self._tail: deque[int] = deque(maxlen=size - 1)
        self._followers: dict[tuple[int, ...], tuple[int, ...]] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the sequence."""
        if len(self._tail) == self._size - 1:
            prefix = tuple(self._tail)
            self._followers[prefix] = (*self._followers.get(prefix, ()), token)
        self._tail.append(token)

    def banned(self) -> tuple[int, ...]:
        """Tokens that followed the current n − 1 tokens before; none while the sequence is shorter than that."""
        return self._followers.get(tuple(self._tail), ())

    def copy(self) -> SeenNgrams:
        """An independent continuation of the same sequence."""
        other = SeenNgrams(self._size)
        other._tail = self._tail.copy()
        other._followers = self._followers.copy()
        return other


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches `top_p`, at least one; the others become −inf.

    Args:
        logits: [R, V] float32.
        top_p: in (0, 1]; 1 keeps everything.

    Source: Holtzman et al. (2020), section 3.1, with the boundaries of transformers' TopPLogitsWarper.
    """
    if top_p >= 1:
        return logits
    ascending, order = torch.sort(logits, dim=-1)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def uniform_noise(seed: int, example_id: str, steps: int) -> NDArray[np.float64]:
    """One number in [0, 1) per decoding step: the counter-based stream that belongs to (decoding seed, example id).

    A longer request begins with the numbers of a shorter one.
    """
    digest = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(steps)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from softmax(logits) by the inverse of its cumulative distribution, in vocabulary order.

    Blocks of the vocabulary are summed first and only the chosen block is searched, so the vocabulary is neither sorted
    nor accumulated in double precision as a whole.

    Args:
        logits: [R, V] float32, −inf for excluded tokens, at least one finite value per row.
        uniforms: [R] float64 in [0, 1).

    Returns:
        [R] token ids. Excluded tokens are never drawn.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // _BLOCK)
    mass = logits.new_zeros(rows, blocks * _BLOCK)
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=mass[:, :vocabulary])
    mass[:, :vocabulary].exp_()
    by_block = mass.view(rows, blocks, _BLOCK)
    ends = by_block.sum(dim=-1).double().cumsum(dim=-1)
    target = uniforms * ends[:, -1]
    block = _first_above(ends, target)
    row = torch.arange(rows, device=logits.device)
    before = torch.where(block > 0, ends[row, (block - 1).clamp(min=0)], 0.0)
    within = _first_above(by_block[row, block].double().cumsum(dim=-1), target - before)
    return block * _BLOCK + within


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    # Rounding may put the target at or beyond the end; just below it lies the last entry that has any mass.
    last = torch.nextafter(cumulative[:, -1], torch.zeros_like(target))
    return torch.searchsorted(cumulative, torch.minimum(target, last)[:, None], right=True)[:, 0]
