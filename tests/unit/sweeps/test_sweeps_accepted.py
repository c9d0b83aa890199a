from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pipeline.sweeps.accepted import Check, check_accepted


@dataclass(frozen=True)
class Named:
    name: str


@dataclass(frozen=True)
class Where:
    path: Path


@dataclass(frozen=True)
class FakeEvaluation:
    place: Where
    benchmark: Named


@dataclass(frozen=True)
class FakeTrial:
    row: str
    seed: int | None
    evaluations: tuple[FakeEvaluation, ...]


@dataclass(frozen=True)
class FakeSweepTrial:
    trial: FakeTrial


def evaluated(folder: Path, row: str, shift: float, version: int, protocol: str = "p", prompts: int = 80) -> FakeSweepTrial:
    """A trial whose scores differ from those of version 0 by `shift` and a little noise."""
    base, noise = random.Random(row), random.Random(f"{row} {version}")
    path = folder / "artifacts" / "evaluate" / f"{row}-{version}-{protocol}"
    path.mkdir(parents=True)
    scores = [20 + 10 * base.random() + shift + noise.gauss(0, 1) for _ in range(prompts)]
    rows = {"id": [str(i) for i in range(prompts)], "seed": [1] * prompts, "rouge_l": scores}
    parquet.write_table(pa.table(rows), path / "generations.parquet")
    (path / "scores.json").write_text(json.dumps({"protocol_hash": protocol}))
    return FakeSweepTrial(FakeTrial(row, 10, (FakeEvaluation(Where(path), Named("dolly")),)))


def check(folder: Path, *trials: Any, accept: bool = False) -> Check:
    (folder / "s").mkdir(exist_ok=True)
    return check_accepted(trials, folder, "s", accept)


def test_the_first_scores_are_accepted_and_equal_ones_say_nothing(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "kd", 0.0, 0)
    assert check(tmp_path, first) == check(tmp_path, first) == Check((), ())


def test_a_drop_beyond_noise_is_a_regression_until_it_is_accepted(tmp_path: Path) -> None:
    check(tmp_path, evaluated(tmp_path, "kd", 0.0, 0), evaluated(tmp_path, "sft", 0.0, 0))
    worse, same = evaluated(tmp_path, "kd", -2.0, 1), evaluated(tmp_path, "sft", 0.0, 1)
    for _ in range(2):  # what regressed is not accepted by being looked at
        found = check(tmp_path, worse, same)
        assert [drop.row for drop in found.regressed] == ["kd"]
    assert found.regressed[0].effect.difference == pytest.approx(-2.0, abs=0.6)
    assert "| kd | -" in found.markdown() and "**regression**" in found.markdown()
    assert [drop.row for drop in check(tmp_path, worse, accept=True).regressed] == ["kd"]
    assert check(tmp_path, worse, same) == Check((), ())


def test_noise_and_gains_are_accepted(tmp_path: Path) -> None:
    check(tmp_path, evaluated(tmp_path, "kd", 0.0, 0), evaluated(tmp_path, "sft", 0.0, 0))
    better, noisy = evaluated(tmp_path, "kd", 3.0, 1), evaluated(tmp_path, "sft", 0.0, 2)
    found = check(tmp_path, better, noisy)
    assert len(found.changed) == 2 and not found.regressed
    # Tonight's are the accepted ones now: falling back to the first is a regression.
    assert [drop.row for drop in check(tmp_path, evaluated(tmp_path, "kd", 0.0, 3)).regressed] == ["kd"]


def test_another_protocol_is_not_compared_and_starts_anew(tmp_path: Path) -> None:
    check(tmp_path, evaluated(tmp_path, "kd", 0.0, 0))
    other = evaluated(tmp_path, "kd", -5.0, 1, protocol="q")
    found = check(tmp_path, other)
    assert found == Check((), ("kd",)) and "not comparable" in found.markdown()
    assert check(tmp_path, other) == Check((), ())


def test_rows_that_were_not_run_tonight_stay_accepted(tmp_path: Path) -> None:
    check(tmp_path, evaluated(tmp_path, "kd", 0.0, 0))
    check(tmp_path, evaluated(tmp_path, "sft", 0.0, 0))
    assert [drop.row for drop in check(tmp_path, evaluated(tmp_path, "kd", -3.0, 1)).regressed] == ["kd"]
