"""The paper's scores for an experiment that has the paper's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipeline.config.experiment import Experiment
from pipeline.reporting.paper import EVERY, LEDGER, SCORES, Score, Setting, ours

_CONFIGS = {("Qwen2.5-1.5B", "Qwen2.5-3B"): "qwen2.5-1.5b"}
"""Student and teacher of published scores → configuration of the ledger."""
_FREE = ("train.seeds", "methods", "benchmarks")
"""More training seeds are not another configuration; methods and benchmarks are compared one by one."""


def published(experiment: Experiment) -> dict[tuple[str, str], Score]:
    """(method, benchmark) → the published score, where every setting that it depends on is the published one.

    Settings in which our configuration deviates from the paper by design (see the ledger) are not compared.
    """
    found = {}
    for score in SCORES:
        config = _CONFIGS.get((score.student, score.teacher))
        settings = [replace(setting, config=config) for setting in LEDGER if config and setting.config in (EVERY, config)]
        here = score.method in experiment.methods and score.benchmark in experiment.benchmarks
        if config and here and _agree(_relevant(settings, score), config, experiment):
            found[score.method, score.benchmark] = score
    return found


def _relevant(settings: Iterable[Setting], score: Score) -> list[Setting]:
    own = (f"methods.{score.method}.", f"benchmarks.{score.benchmark}.", "benchmarks.*.")
    return [
        setting
        for setting in settings
        if not setting.deviation and (setting.path.startswith(own) or not setting.path.startswith(_FREE))
    ]


def _agree(settings: Iterable[Setting], config: str, experiment: Experiment) -> bool:
    # A setting that is missing or null here, or that benchmarks have differently, is not the published one.
    for setting in settings:
        try:
            value = ours(setting, {config: experiment})
        except (KeyError, TypeError, ValueError):
            return False
        if value != setting.theirs:
            return False
    return True
