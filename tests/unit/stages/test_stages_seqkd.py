"""Sequence-level KD: the student is trained on what the teacher wrote, not on the references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import stages
import torch

from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import read_encoded
from pipeline.errors import DataError
from pipeline.models.load import load_model
from pipeline.plan import Plan
from pipeline.stages import prepare, seqkd, train
from pipeline.stages.prepare import TRAIN
from pipeline.training import feed

GREEDY = {"seqkd": {"generation": {"decoding": {"do_sample": False, "max_new_tokens": 9}, "batch_size": 5}}}


def planned(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return stages.planned(folder, "validation.select=loss", "train.seeds=[10]", *overrides, **{"methods": GREEDY, **changes})


def rows(plan: Plan, made_by: Any) -> dict[str, EncodedExample]:
    return {row.id: row for row in read_encoded(made_by.place.path / TRAIN)}


def response(row: EncodedExample) -> tuple[int, ...]:
    return row.input_ids[row.prompt_tokens :]


@torch.no_grad()
def plain_greedy(folder: Path, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Token by token without any of the pipeline's decoding."""
    model, ids = load_model(folder), list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    return tuple(ids[len(prompt) :])


def test_the_student_sees_the_teachers_responses_and_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = stages.run_inputs(planned(tmp_path))
    seen: list[EncodedExample] = []
    collate = feed.collate

    def spy(examples: Sequence[EncodedExample], pad_token_id: int) -> Any:
        seen.extend(examples)
        return collate(examples, pad_token_id)

    monkeypatch.setattr(feed, "collate", spy)
    train.run(stages.training(plan, "seqkd"))
    gold = rows(plan, plan.data)
    assert len({row.id for row in seen}) == 24
    for row in seen:
        own = gold[row.id]
        assert row.input_ids[: row.prompt_tokens] == own.input_ids[: own.prompt_tokens]
        assert response(row) == plain_greedy(tmp_path / "teacher", row.input_ids[: row.prompt_tokens], 9)
        assert response(row) != response(own)


def test_it_is_supervised_learning_without_a_teacher_beside_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, methods={**GREEDY, "sft": None})
    run = stages.training(plan, "seqkd")
    assert run.alpha == 0 and run.cache is None and plan.cache is None
    assert "teacher" not in run.place.upstream and run.place.upstream["seqkd"] == plan.generations[0].place.fingerprint
    assert stages.training(plan, "sft").generated is None


def test_what_changes_the_responses_changes_the_training(tmp_path: Path) -> None:
    def fingerprints(*overrides: str) -> tuple[str, str]:
        plan = planned(tmp_path, *overrides)
        return plan.generations[0].place.fingerprint, stages.training(plan, "seqkd").place.fingerprint

    first = fingerprints()
    assert fingerprints("methods.seqkd.generation.batch_size=1") == first
    for change in ("seed=3", "decoding.max_new_tokens=8", "decoding.temperature=0.5"):
        other = fingerprints(f"methods.seqkd.generation.{change}")
        assert other[0] != first[0] and other[1] != first[1]


def test_two_methods_with_the_same_generation_share_it(tmp_path: Path) -> None:
    body = GREEDY["seqkd"]
    plan = planned(tmp_path, methods={"a": {"kind": "seqkd", **body}, "b": {"kind": "seqkd", **body}})
    assert len(plan.generations) == 1 and stages.training(plan, "b").generated is not None


def test_an_interrupted_generation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(tmp_path)
    prepare.run(whole.data)
    seqkd.run(whole.generations[0])
    decoded: list[int] = []
    write_part = seqkd._write_part

    def counting(file: Path, decoder: Any, batch: Any) -> None:
        if len(decoded) == 2:
            raise KeyboardInterrupt
        write_part(file, decoder, batch)
        decoded.append(len(batch))

    other = planned(tmp_path, run_dir=tmp_path / "again")
    prepare.run(other.data)
    monkeypatch.setattr(seqkd, "_write_part", counting)
    with pytest.raises(KeyboardInterrupt):
        seqkd.run(other.generations[0])
    decoded.append(0)  # past the interruption
    artifact = seqkd.run(other.generations[0])
    assert decoded == [5, 5, 0, 5, 5, 4] and not (artifact.path / "parts").exists()
    expected = (whole.generations[0].place.path / TRAIN).read_bytes()
    assert (artifact.path / TRAIN).read_bytes() == expected


def test_blank_responses_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path)
    prepare.run(plan.data)
    blank = {row_id for index, row_id in enumerate(rows(plan, plan.data)) if index % 3 == 0}
    responses = {response(row): row_id for row_id, row in rows_of_teacher(plan).items()}
    monkeypatch.setattr(seqkd, "decode", lambda _, ids: "" if responses[tuple(ids)] in blank else "text")
    artifact = seqkd.run(plan.generations[0])
    counts = artifact.manifest.counts
    assert (counts["rows"], counts["kept"], counts["empty"]) == (24, 16, 8)
    assert blank.isdisjoint(rows(plan, plan.generations[0]))


def rows_of_teacher(plan: Plan) -> dict[str, EncodedExample]:
    folder = Path(str(plan.generations[0].teacher.folder()))
    gold = rows(plan, plan.data)
    written = {}
    for row_id, row in gold.items():
        prompt = row.input_ids[: row.prompt_tokens]
        written[row_id] = EncodedExample(row_id, (*prompt, *plain_greedy(folder, prompt, 9)), len(prompt))
    assert len({response(row) for row in written.values()}) == len(written)
    return written


def test_a_teacher_that_says_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path)
    prepare.run(plan.data)
    monkeypatch.setattr(seqkd, "decode", lambda *_: "")
    with pytest.raises(DataError, match="all 24 responses of the teacher are blank"):
        seqkd.run(plan.generations[0])


def test_dropped_rows_do_not_shorten_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-3, "seeds": [10]}
    plan = planned(tmp_path, train=budget)
    prepare.run(plan.data)
    monkeypatch.setattr(seqkd, "decode", lambda _, ids: "" if sum(ids) % 2 else "text")
    stages.run_inputs(plan)
    assert plan.generations[0].place.open().manifest.counts["kept"] < 18
    assert train.run(stages.training(plan, "seqkd")).manifest.counts["steps"] == 8
