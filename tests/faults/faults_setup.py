"""What the tests of this folder share: how much is tried, the undisturbed run, and the count of faults."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.plan import Plan

ALL = os.environ.get("DISTILLLENS_FAULTS") == "all"
PROPERTY = "fault"


@dataclass(frozen=True)
class Undisturbed:
    """A finished run.

    Attributes:
        folder: the experiment's files.
        run_dir: its run directory; not to be changed.
        plan: its plan.
        work: the pieces of work that it took.
        events: the changes of the run directory, in order.
        results: everything in it that is not a time.
    """

    folder: Path
    run_dir: Path
    plan: Plan
    work: dict[str, int]
    events: list[str]
    results: dict[str, Any]

    def copy_without(self, stage: str, target: Path) -> Path:
        """A copy of the run directory in which a stage is still to be done; of trainings one, of evaluations two."""
        shutil.copytree(self.run_dir, target)
        folder = target / "tiny" / "comparison" if stage == "compare" else target / "artifacts" / stage
        left = {"train": 1, "evaluate": 2}.get(stage, len(list(target.rglob("*"))))
        for artifact in [folder] if stage == "compare" else sorted(folder.iterdir())[:left]:
            shutil.rmtree(artifact)
        return target


class Tally:
    """Counts the faults that a test tries, under a name that is a row of the table."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def __call__(self, fault: str, survived: bool, lost: str = "", times: int = 1) -> None:
        """One fault, tried `times` times; fails the test if it was not survived, with what was lost."""
        self._properties.append((PROPERTY, [fault, times, times if survived else 0]))
        assert survived, f"{fault}: {lost}"
