"""`cache.parts`: several processes or machines capture one cache, which is the same as if one had done it in one go."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stages
import torch

from pipeline import lease
from pipeline.artifacts import MANIFEST
from pipeline.plan import Plan
from pipeline.stages import cache, prepare, train
from pipeline.stages.cache import CachePlan, plan_parts
from pipeline.stages.fit import METRICS
from pipeline.store import VARIABLE
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import read_ledger
from pipeline.teacher.cache.writer import capture, read_ids

METHODS = {"kd": None, "distilllens": {"lens": {"pairs": {"kind": "uniform", "count": 2}}}}
Parts = list[tuple[int, int]]


def planned(folder: Path, parts: int, *overrides: str, run_dir: Path | None = None) -> tuple[Plan, CachePlan]:
    """The experiment under `folder`, with its rows prepared, and its cache."""
    settings = (f"cache.parts={parts}", "cache.batch_size=1", "train.seeds=[10]", *overrides)
    plan = stages.planned(folder, *settings, run_dir=run_dir, methods=METHODS)
    prepare.run(plan.data)
    assert plan.cache is not None
    return plan, plan.cache


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """The parts that are captured, in order."""
    parts: Parts = []

    def recorded(*args: Any, **settings: Any) -> Any:
        parts.append(settings["part"])
        return capture(*args, **settings)

    monkeypatch.setattr(cache, "capture", recorded)
    return parts


def opened(plan: CachePlan) -> CachedTeacher:
    return CachedTeacher(plan.place.open().path, plan.key, num_layers=6, device=torch.device("cpu"))


def losses(folder: Path, parts: int, method: str) -> list[float]:
    plan = stages.run_inputs(planned(folder, parts, run_dir=folder / f"runs{parts}")[0])
    artifact = train.run(stages.training(plan, method))
    records = [json.loads(line)["metrics"] for line in (artifact.path / METRICS).read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.parametrize("method", METHODS)
def test_training_from_a_merged_cache_is_training_from_a_whole_one(tmp_path: Path, method: str, captured: Parts) -> None:
    whole, merged = losses(tmp_path, 1, method), losses(tmp_path, 3, method)
    assert captured == [(0, 1), (0, 3), (1, 3), (2, 3)]
    assert len(whole) == 4 and merged == whole


def test_parts_change_neither_the_caches_identity_nor_its_content(tmp_path: Path) -> None:
    _, one = planned(tmp_path, 1, run_dir=tmp_path / "one")
    plan, three = planned(tmp_path, 3, run_dir=tmp_path / "three")
    assert one.place.fingerprint == three.place.fingerprint
    whole, merged = cache.run(one), cache.run(three)
    assert merged.manifest.recipe == whole.manifest.recipe
    for name in ("rows", "response_tokens"):
        assert merged.manifest.counts[name] == whole.manifest.counts[name]
    ours, theirs, ledger = opened(three), opened(one), read_ledger(one.place.path)
    assert ledger is not None and len(ours) == len(theirs) == 24
    for shard in ledger.shards:
        for name in read_ids(one.place.path / shard.file):
            for layer in one.key.layers:
                assert (ours.row(name, layer) == theirs.row(name, layer)).all()


def test_the_parts_are_linked(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, 2)
    merged = cache.run(plan).path
    shards = {file.name: file for part in plan_parts(plan) for file in part.open().path.glob("*.arrow")}
    assert {file.name for file in merged.iterdir()} == {*shards, "ledger.json", MANIFEST}
    assert len(shards) == 2 and all((merged / name).samefile(file) for name, file in shards.items())


def test_more_parts_than_rows(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, 60)
    cache.run(plan)
    assert len(opened(plan)) == 24


@pytest.mark.parametrize("machines", [1, 2])
def test_two_at_once_share_the_parts_and_wait_for_each_other(
    tmp_path: Path, machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is held up in its first part; the other takes the rest, waits for that part, and each is captured once."""
    plans = {"slow": planned(tmp_path, 4)[1], "quick": planned(tmp_path, 4)[1]}
    if machines == 2:
        monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
        monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
        plans["quick"] = planned(tmp_path, 4, run_dir=tmp_path / "other")[1]
    first_started, others_done = threading.Event(), threading.Event()
    captured: list[tuple[str, int]] = []

    def held_up(*args: Any, **settings: Any) -> Any:
        index = settings["part"][0]
        captured.append((threading.current_thread().name, index))
        if index == 0:
            first_started.set()
            assert others_done.wait(60)
        counts = capture(*args, **settings)
        if index == 3:
            others_done.set()
        return counts

    monkeypatch.setattr(cache, "capture", held_up)
    threads = [threading.Thread(target=cache.run, args=(plan,), name=name) for name, plan in plans.items()]
    threads[0].start()
    assert first_started.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert captured == [("slow", 0), ("quick", 1), ("quick", 2), ("quick", 3)]
    assert len(opened(plans["slow"])) == len(opened(plans["quick"])) == 24


def failing(part: int) -> Callable[..., Any]:
    def fail(*args: Any, **settings: Any) -> Any:
        if settings["part"][0] == part:
            raise RuntimeError("power cut")
        return capture(*args, **settings)

    return fail


def test_an_interrupted_capture_goes_on_with_the_part_that_is_missing(
    tmp_path: Path, captured: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = planned(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "capture", failing(1))
        with pytest.raises(RuntimeError, match="power cut"):
            cache.run(plan)
    cache.run(plan)
    assert captured == [(1, 3), (2, 3)]
    cache.run(plan)
    assert len(captured) == 2


def test_machines_share_parts_through_the_store(tmp_path: Path, captured: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    _, one = planned(tmp_path, 2, run_dir=tmp_path / "one")
    _, two = planned(tmp_path, 2, run_dir=tmp_path / "two")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "capture", failing(1))
        with pytest.raises(RuntimeError, match="power cut"):
            cache.run(one)
    assert cache.run(two).path.is_relative_to(tmp_path / "two") and captured == [(1, 2)]
    assert cache.run(one).path.is_relative_to(tmp_path / "one") and captured == [(1, 2)]
    assert len(opened(one)) == len(opened(two)) == 24


def test_nothing_of_an_interrupted_whole_capture_stays_in_a_merged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = planned(tmp_path, 1)

    def broken(*args: Any, **settings: Any) -> Any:
        capture(*args, **settings)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "capture", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            cache.run(whole)
    left = whole.place.path.with_name(whole.place.path.name + ".partial")
    assert list(left.glob("part-000-of-001-*.arrow"))
    _, plan = planned(tmp_path, 2)
    merged = cache.run(plan)
    assert {name[:15] for name in merged.manifest.files} == {"part-000-of-002", "part-001-of-002", "ledger.json"}


def test_the_disk_must_hold_what_is_not_captured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = planned(tmp_path, 2)
    asked: list[int] = []
    monkeypatch.setattr(cache, "check_disk", lambda folder, needed: asked.append(needed))
    cache.run(plan)
    first = plan_parts(plan)[0]
    held = sum(file.stat().st_size for file in first.path.iterdir())
    assert asked[0] > asked[1] == asked[0] - held
    shutil.rmtree(plan.place.path)
    cache.run(plan)  # joined from the parts that are there
    assert len(asked) == 2
