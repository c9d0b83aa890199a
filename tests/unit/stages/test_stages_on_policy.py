"""On-policy steps train on what the student itself says at that moment, with any method that has a teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from safetensors.torch import load_file

from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import read_encoded
from pipeline.plan import Plan
from pipeline.stages import train
from pipeline.stages.prepare import TRAIN
from pipeline.training import feed, loop
from pipeline.training.on_policy import is_on_policy

PAIRS = {"pairs": {"kind": "uniform", "count": 2}}
OWN = {"fraction": 0.5, "decoding": {"max_new_tokens": 6}}
METHODS = {
    "kd": {"on_policy": OWN},
    "mse": {"features": PAIRS, "on_policy": OWN},
    "distilllens": {"lens": PAIRS, "on_policy": OWN},
}
SETTINGS = ("validation.select=loss", "train.seeds=[10]", "cache.enabled=false", "train.max_steps=6")
CHOSEN = [is_on_policy(10, step, 0.5) for step in range(6)]


def planned(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return stages.planned(folder, *SETTINGS, *overrides, **{"methods": METHODS, **changes})


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if "train/loss" in line["metrics"]]


def test_the_test_has_steps_of_both_kinds() -> None:
    assert 0 < sum(CHOSEN) < len(CHOSEN)


@pytest.mark.parametrize("method", METHODS)
def test_chosen_steps_train_on_the_students_own_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    plan = stages.run_inputs(planned(tmp_path))
    seen: list[list[EncodedExample]] = []
    collate = feed.collate

    def spy(examples: Sequence[EncodedExample], pad_token_id: int) -> Any:
        seen.append(list(examples))
        return collate(examples, pad_token_id)

    monkeypatch.setattr(feed, "collate", spy)
    artifact = train.run(stages.training(plan, method))
    gold = {row.id: row for row in read_encoded(plan.data.place.path / TRAIN)}
    own = [[row for row in batch if row.input_ids != gold[row.id].input_ids] for batch in seen]
    # The next step is collated ahead while one is sampled, so batches are told apart by their rows, not by their place.
    assert sum(len(rows) == 6 for rows in own) == sum(CHOSEN) and sum(not rows for rows in own) == 6 - sum(CHOSEN)
    for rows in own:
        for row in rows:
            reference = gold[row.id]
            prompt = reference.prompt_tokens
            assert row.prompt_tokens == prompt and row.input_ids[:prompt] == reference.input_ids[:prompt]
            assert 1 <= len(row.input_ids) - prompt <= 6
    assert [record["train/on_policy"] for record in records(artifact.path)] == [float(chosen) for chosen in CHOSEN]


def test_steps_up_to_the_first_own_one_are_those_of_plain_training(tmp_path: Path) -> None:
    plan = stages.run_inputs(planned(tmp_path))
    plain = stages.run_inputs(planned(tmp_path, methods={"kd": None}))
    ours = [record["train/loss"] for record in records(train.run(stages.training(plan, "kd")).path)]
    theirs = [record["train/loss"] for record in records(train.run(stages.training(plain, "kd")).path)]
    first = CHOSEN.index(True)
    assert ours[:first] == theirs[:first] and ours[first] != theirs[first]
    assert not any("train/on_policy" in record for record in records(stages.training(plain, "kd").place.path))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stages.run_inputs(planned(tmp_path))
    first = train.run(stages.training(whole, "distilllens")).path
    cut = stages.run_inputs(stages.planned(tmp_path, *SETTINGS, methods=METHODS, run_dir=tmp_path / "cut"))
    steps, optimizer_step = [0], loop.optimizer_step

    def stopping(*arguments: Any, **named: Any) -> Any:
        steps[0] += 1
        if steps[0] == 4:
            raise KeyboardInterrupt
        return optimizer_step(*arguments, **named)

    monkeypatch.setattr(loop, "optimizer_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.run(stages.training(cut, "distilllens"))
    torch.manual_seed(99)
    second = train.run(stages.training(cut, "distilllens")).path
    ours, theirs = load_file(first / "model" / "model.safetensors"), load_file(second / "model" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_settings_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        return stages.training(planned(tmp_path, *overrides), "kd").place.fingerprint

    changes = ("fraction=0.25", "decoding.temperature=0.5")
    assert len({fingerprint(), *(fingerprint(f"methods.kd.on_policy.{change}") for change in changes)}) == 3
