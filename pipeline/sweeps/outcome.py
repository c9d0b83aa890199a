"""What a sweep came to: who finished, who failed and why, what is left; and the objective of its points."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import PipelineError
from pipeline.stages.compare import ComparePlan
from pipeline.sweeps.plan import SweepTrial


class SweepFailed(PipelineError):
    """Some trials failed; the others are finished and compared."""

    exit_code = 1


@dataclass(frozen=True)
class Outcome:
    """Outcome of one call.

    Attributes:
        finished: trials whose every artifact is there.
        ran: how many of them this call carried out.
        failed: trial → reason.
        left: trials that the budget did not reach.
    """

    finished: tuple[SweepTrial, ...]
    ran: int
    failed: Mapping[str, str]
    left: tuple[str, ...]

    def text(self) -> str:
        """One line."""
        parts = [f"{len(self.finished)} trials finished ({self.ran} of them now)"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.left:
            parts.append(f"{len(self.left)} left by the budget; the same command goes on with them")
        return ", ".join(parts) if self.ran or self.failed or self.left else f"nothing new: {parts[0].split(' (')[0]}"


@dataclass(frozen=True)
class Result:
    """What a call leaves: the comparison of what is finished, and its outcome."""

    comparison: ComparePlan
    outcome: Outcome


def objective(trials: Sequence[SweepTrial]) -> float | None:
    """Mean of the selected validation value over a point's trials; None if one of them is missing or has none."""
    values = []
    for trial in trials:
        artifact = trial.trial.train.place.existing() if trial.trial.train else None
        value = None if artifact is None else artifact.manifest.counts["best_value"]
        if value is None:
            return None
        values.append(float(value))
    return statistics.fmean(values) if values else None
