"""Lens profiles as a stage: which pairs, which rows, one artifact a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stages

from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import read_encoded
from pipeline.errors import ArtifactError
from pipeline.evaluation.lens_view import token_text, visible
from pipeline.models.load import load_tokenizer
from pipeline.plan import Plan
from pipeline.stages import lens_profile, train
from pipeline.stages.lens_profile import HEAT, HEAT_TOKENS, LensProfilePlan, heat_row, read_profile, read_profile_heat
from pipeline.stages.prepare import DEV

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


def test_the_heat_map_is_of_one_row_and_agrees_with_the_profile_of_that_row(tmp_path: Path) -> None:
    plan = stages.run_inputs(planned(tmp_path, "evaluation.lens_profile={rows: 1}", "train.max_steps=3"))
    train.run(stages.training(plan, "kd"))
    found = []
    for method in ("untrained", "kd"):
        own = profile(plan, method)
        lens_profile.run(own)
        found.append(read_profile_heat(own))
        layers = read_profile(own)
        assert list(found[-1].pairs) == [(layer.student_layer, layer.teacher_layer) for layer in layers]
        assert len(found[-1].tokens) == layers[0].tokens > 1  # the row's whole response
        assert [sum(line) / len(line) for line in found[-1].jsd] == pytest.approx([layer.jsd for layer in layers], rel=1e-5)
    row = read_encoded(plan.data.place.open().path / DEV)[0]
    tokenizer = load_tokenizer(profile(plan, "untrained").initial.place.open().path)
    assert found[0].tokens == tuple(visible(token_text(tokenizer, token)) for token in row.input_ids[row.prompt_tokens :])
    assert found[0].tokens == found[1].tokens and found[0].pairs == found[1].pairs and found[0].jsd != found[1].jsd
    (profile(plan, "kd").place.open().path / HEAT).write_text("{}")
    with pytest.raises(ArtifactError, match="heat.json"):
        read_profile_heat(profile(plan, "kd"))


def test_the_row_of_the_heat_map_is_the_first_with_enough_of_a_response() -> None:
    def row(name: str, response: int) -> EncodedExample:
        return EncodedExample(name, tuple(range(3 + response)), 3)

    assert heat_row([row("a", 7), row("b", 8), row("c", 20)]) == row("b", 8)
    assert heat_row([row("a", 2), row("b", 7), row("c", 7)]) == row("b", 7)
    assert heat_row([row("a", HEAT_TOKENS + 9)]) == row("a", HEAT_TOKENS)


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
