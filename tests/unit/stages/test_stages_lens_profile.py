"""Lens profiles as a stage: which pairs, which rows, one artifact a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stages

from pipeline.plan import Plan
from pipeline.stages import lens_profile, train
from pipeline.stages.lens_profile import LensProfilePlan, read_profile

SETTINGS = ("validation.select=loss", "train.seeds=[10]", "evaluation.lens_profile=true")
LAST = (3, 6)


def planned(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return stages.planned(folder, *SETTINGS, *overrides, **{"methods": {"kd": None}, **changes})


def profile(plan: Plan, method: str) -> LensProfilePlan:
    found = next(trial.profile for trial in plan.trials if trial.method == method)
    assert found is not None
    return found


def pairs(plan: LensProfilePlan) -> list[tuple[int, int]]:
    return [(layer.student_layer, layer.teacher_layer) for layer in read_profile(plan)]


def test_training_brings_the_student_closer_at_the_end(tmp_path: Path) -> None:
    plan = stages.run_inputs(planned(tmp_path, "train.max_steps=30", "train.learning_rate=5e-3"))
    train.run(stages.training(plan, "kd"))
    for method in ("untrained", "kd"):
        lens_profile.run(profile(plan, method))
    before, after = read_profile(profile(plan, "untrained"))[-1], read_profile(profile(plan, "kd"))[-1]
    assert before.final and after.final and after.jsd < 0.9 * before.jsd
    counts = profile(plan, "kd").place.open().manifest.counts
    assert counts["rows"] == 6 and counts["tokens"] == after.tokens > 0


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ({"kd": None}, [(1, 2), (2, 4), LAST]),
        ({"kd": None, "distilllens": {"lens": {"pairs": {"kind": "explicit", "pairs": [[1, 5]]}}}}, [(1, 5), LAST]),
        ({"distilllens": {"lens": {"pairs": {"kind": "explicit", "pairs": [[3, 6], [0, 0]]}}}}, [LAST, (0, 0)]),
    ],
)
def test_the_pairs_are_those_of_the_method_with_a_lens(
    tmp_path: Path, methods: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    plan = stages.run_inputs(planned(tmp_path, methods=methods))
    lens_profile.run(profile(plan, "untrained"))
    assert pairs(profile(plan, "untrained")) == expected


def test_pairs_follow_the_provenance_of_the_student(tmp_path: Path) -> None:
    methods = {"distilllens": {"lens": {"pairs": {"kind": "provenance", "count": 1}}}}
    plan = stages.run_inputs(planned(tmp_path, "student.drop_from=2", methods=methods))
    lens_profile.run(profile(plan, "untrained"))
    assert pairs(profile(plan, "untrained")) == [(2, 5), LAST]  # layers 2 to 4 of 6 are gone, so the second was the fifth


def test_only_what_it_depends_on_makes_another(tmp_path: Path) -> None:
    def fingerprints(*overrides: str) -> tuple[str, str]:
        plan = planned(tmp_path, *overrides)
        return profile(plan, "untrained").place.fingerprint, profile(plan, "kd").place.fingerprint

    first = fingerprints()
    assert fingerprints("evaluation.lens_profile={batch_size: 2}") == first
    other_rows, other_training = fingerprints("evaluation.lens_profile={rows: 3}"), fingerprints("train.max_steps=5")
    assert other_rows[0] != first[0] and other_rows[1] != first[1]
    assert other_training[0] == first[0] and other_training[1] != first[1]


def test_without_being_asked_for_there_is_none(tmp_path: Path) -> None:
    plan = stages.planned(tmp_path, methods={"kd": None})
    assert all(trial.profile is None for trial in plan.trials)
    assert profile(planned(tmp_path), "kd") and planned(tmp_path).trials[0].profile is None  # the teacher has none
