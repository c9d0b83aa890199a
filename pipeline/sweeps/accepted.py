"""The scores that a sweep last accepted, and whether tonight's are below them by more than noise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as parquet

from pipeline.artifacts import write_text_atomically
from pipeline.errors import DataError, PipelineError
from pipeline.reporting.compare import prompt_scores, regression
from pipeline.reporting.statistics import ALPHA, Effect, PromptScores, holm
from pipeline.stages.evaluate import GENERATIONS, read_scores
from pipeline.sweeps.plan import SweepTrial

Evaluations = dict[str, dict[str, str]]
"""Benchmark → training seed → folder of the evaluation, relative to the run directory."""


class SweepRegressed(PipelineError):
    """A row scores below what was last accepted by more than noise."""

    exit_code = 1


@dataclass(frozen=True)
class Drop:
    """A row whose scores are not the accepted ones any more.

    Attributes:
        row: of the table.
        effect: new minus accepted, mean over benchmarks, ROUGE-L points.
        adjusted_p: one-sided, Holm's over the rows that changed.
    """

    row: str
    effect: Effect
    adjusted_p: float

    def text(self) -> str:
        """One line."""
        effect = self.effect
        return (
            f"  - {self.row}: {effect.difference:+.2f} ROUGE-L ({effect.low:+.2f} to {effect.high:+.2f}, "
            f"one-sided p = {self.adjusted_p:.3f} over the rows that changed)"
        )

    @property
    def regressed(self) -> bool:
        """Whether it is below by more than noise, at 5 % over all rows together."""
        return self.adjusted_p <= ALPHA


@dataclass(frozen=True)
class Check:
    """What became of the accepted scores.

    Attributes:
        changed: rows with other evaluations than the accepted ones, on the same prompts and protocol.
        not_comparable: rows whose prompts, protocol or artifacts are not those of the accepted scores.
    """

    changed: tuple[Drop, ...]
    not_comparable: tuple[str, ...]

    @property
    def regressed(self) -> tuple[Drop, ...]:
        """Rows that are below."""
        return tuple(drop for drop in self.changed if drop.regressed)

    def markdown(self) -> str:
        """A table for people."""
        lines = ["| row | change of ROUGE-L | 95 % interval | p (one-sided, Holm) | |", "| --- | ---: | --- | ---: | --- |"]
        for drop in sorted(self.changed, key=lambda item: item.adjusted_p):
            effect, word = drop.effect, "**regression**" if drop.regressed else "within noise or better"
            interval = f"{effect.low:+.2f} to {effect.high:+.2f}"
            lines.append(f"| {drop.row} | {effect.difference:+.2f} | {interval} | {drop.adjusted_p:.3f} | {word} |")
        lines += [f"| {row} | – | – | – | not comparable: other prompts or protocol |" for row in self.not_comparable]
        return "\n".join(lines)


def check_accepted(trials: Iterable[SweepTrial], run_dir: Path, name: str, accept: bool = False) -> Check:
    """Compare finished trials with the accepted scores, and accept those that are not below them.

    Args:
        trials: finished ones.
        run_dir: with the artifacts and RUN_DIR/NAME/accepted.json.
        name: of the sweep.
        accept: take the new scores whatever they are.
    """
    path = run_dir / name / "accepted.json"
    accepted = _read(path)
    found = _evaluations(trials, run_dir)
    effects: dict[str, Effect] = {}
    incomparable = []
    for row, new in found.items():
        old = accepted.get(row)
        if old is None or old == new:
            continue
        try:
            effects[row] = regression(_scores(row, new, run_dir), _scores(row, old, run_dir)).effect
        except (DataError, FileNotFoundError):
            incomparable.append(row)
    adjusted = holm([effect.p_lower for effect in effects.values()])
    drops = [Drop(row, effect, p) for (row, effect), p in zip(effects.items(), adjusted, strict=True)]
    check = Check(tuple(drops), tuple(incomparable))
    kept = set() if accept else {drop.row for drop in check.regressed}
    taken = {row: new for row, new in found.items() if row not in kept}
    write_text_atomically(path, json.dumps({**accepted, **taken}, indent=1))
    return check


def _read(path: Path) -> dict[str, Evaluations]:
    try:
        found: dict[str, Evaluations] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _evaluations(trials: Iterable[SweepTrial], run_dir: Path) -> dict[str, Evaluations]:
    rows: dict[str, Evaluations] = {}
    for item in trials:
        for plan in item.trial.evaluations:
            folder = str(plan.place.path.relative_to(run_dir))
            rows.setdefault(item.trial.row, {}).setdefault(plan.benchmark.name, {})[str(item.trial.seed)] = folder
    return rows


def _scores(row: str, evaluations: Evaluations, run_dir: Path) -> Sequence[PromptScores]:
    """Scores of a row by benchmark; each benchmark's name carries its protocol, so that other protocols do not pair.

    Raises:
        DataError: evaluations of a benchmark under several protocols.
        FileNotFoundError: an evaluation is not there any more.
    """
    scores = []
    for benchmark, seeds in evaluations.items():
        folders = {None if seed == "None" else int(seed): run_dir / folder for seed, folder in seeds.items()}
        protocols = {str(read_scores(folder)["protocol_hash"]) for folder in folders.values()}
        if len(protocols) > 1:
            raise DataError(f"{row}: its evaluations on {benchmark} follow several protocols; evaluate all under one")
        tables = {seed: parquet.read_table(folder / GENERATIONS) for seed, folder in folders.items()}
        scores.append(prompt_scores(row, f"{benchmark} {protocols.pop()}", tables))
    return scores
