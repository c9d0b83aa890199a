"""The one type where `teacher` and `training` meet: the teacher's states of a batch, and who supplies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipeline.data.collate import Batch


class TeacherSignal(Protocol):
    """The teacher's hidden states for one batch."""

    def states(self, layer: int, positions: Tensor) -> Tensor:
        """States after teacher layer `layer` at flat positions of the batch.

        Args:
            layer: 0 (embeddings) … L_T. L_T is the final state *after* the final norm, all others are raw.
            positions: [N] indices into the flattened [B·T] grid of the batch.

        Returns:
            [N, d_T], no gradient.

        Raises:
            CacheMismatchError: a cache holds response positions only and others are asked for, or lacks the layer.
        """
        ...


class TeacherSource(Protocol):
    """Supplies the signal of each batch. Implemented by `online.OnlineTeacher` and `cache.reader.CachedTeacher`."""

    @property
    def num_layers(self) -> int:
        """L_T, the number of transformer layers."""
        ...

    @property
    def reads_ahead(self) -> bool:
        """Whether signals may be made on another thread, beside a training step (reading does, computing would compete)."""
        ...

    def signal(self, batch: Batch, layers: Sequence[int]) -> TeacherSignal:
        """The signal of one batch; `layers` lists every layer that will be asked for."""
        ...
