"""A changed byte or a cut in anything that is read again is found by the reader that the pipeline uses, and named."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faults_run
import pytest
import tiny
import torch
from faults_results import differences, results
from faults_run import Fault
from faults_setup import ALL, Tally, Undisturbed

from pipeline.artifacts import MANIFEST, open_or_fail
from pipeline.errors import PipelineError
from pipeline.evaluation import runner
from pipeline.models.lens import logit_lens
from pipeline.stages import seqkd
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import LEDGER, read_ledger
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Progress
from pipeline.training.optim import adamw
from pipeline.training.step import Student

TIMES = 120 if ALL else 25


@dataclass(frozen=True)
class Damage:
    """A seeded change of a file: a byte becomes another one, or the end is cut off."""

    seed: str

    def of(self, content: bytes) -> bytes:
        chosen = random.Random(self.seed)
        place = chosen.randrange(len(content))
        if chosen.random() < 0.25:
            return content[:place]
        return content[:place] + bytes([content[place] ^ chosen.randrange(1, 256)]) + content[place + 1 :]


def try_all(tally: Tally, row: str, files: list[Path], read: Callable[[Path], object]) -> None:
    """Damage files in turn, and read: it must raise one of the pipeline's errors that names the file or its folder."""
    read(files[0])
    for turn in range(TIMES):
        file = files[turn % len(files)]
        whole = file.read_bytes()
        file.write_bytes(Damage(f"{row} {turn}").of(whole))
        try:
            read(file)
            lost = "was not noticed"
        except PipelineError as error:
            lost = "" if str(file.parent) in str(error) and file.name in str(error) else f"is not named: {error}"
        finally:
            file.write_bytes(whole)
        tally(row, not lost, f"damage {turn} of {file} {lost}")
    read(files[0])


def copied(undisturbed: Undisturbed, stage: str, tmp_path: Path) -> Path:
    """A copy of the first artifact of a stage."""
    first = min((undisturbed.run_dir / "artifacts" / stage).iterdir())
    shutil.copytree(first, tmp_path / first.name)
    return tmp_path / first.name


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate"])
def test_files_of_an_artifact(stage: str, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = copied(undisturbed, stage, tmp_path)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    try_all(tally, f"damaged file of {stage}", files, lambda _: open_or_fail(folder))


def test_manifests(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = copied(undisturbed, "train", tmp_path)
    try_all(tally, "damaged manifest", [folder / MANIFEST], lambda _: open_or_fail(folder))


def test_shards_and_ledger_of_a_cache(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = copied(undisturbed, "cache", tmp_path)
    ledger = read_ledger(folder)
    assert ledger is not None and len(ledger.shards) > 1

    def read(_: Path) -> object:
        return CachedTeacher(folder, ledger.key, num_layers=ledger.num_layers, device=torch.device("cpu"))

    try_all(tally, "damaged shard", [folder / shard.file for shard in ledger.shards], read)
    try_all(tally, "damaged ledger", [folder / LEDGER], read)


def test_checkpoints(tmp_path: Path, tally: Tally) -> None:
    model = tiny.llama(layers=1, width=16)
    student = Student(model, logit_lens(model), torch.nn.Linear(16, 16))
    optimizer = adamw(student.modules, 1e-3, 0.01, (0.9, 0.999))
    for module in student.modules:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, student, optimizer, Progress(step=1))

    def read(file: Path) -> None:
        checkpoint.load_weights(folder, student)
        checkpoint.load_state(folder, optimizer)

    files = sorted(folder.iterdir())
    assert len(files) == 5
    try_all(tally, "damaged checkpoint", files, read)


def test_generations(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = copied(undisturbed, "evaluate", tmp_path)
    try_all(tally, "damaged generations", [folder / "generations.parquet"], runner._read)


def test_responses_of_the_teacher(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    run_dir = undisturbed.copy_without("seqkd", tmp_path / "runs")
    whole = faults_run.run(undisturbed.folder, undisturbed.copy_without("seqkd", tmp_path / "whole"), tmp_path / "scratch")
    at = next(index for index, event in enumerate(whole.events) if "rmtree" in event and event.endswith("/parts"))
    ended = faults_run.run(undisturbed.folder, run_dir, tmp_path / "scratch", Fault(9, at))
    assert ended.code == -9
    parts = sorted(run_dir.glob("artifacts/seqkd/*.partial/parts/*.json"))
    assert len(parts) == 3
    try_all(tally, "damaged responses", parts, seqkd._read_part)


@pytest.mark.parametrize("stage", ["cache", "evaluate", "seqkd"])
def test_only_the_damaged_piece_is_made_again(stage: str, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    """Killed before its commit, a stage's pieces are damaged: the next run names the piece; without it, it is made anew."""
    piece = {"cache": "*.arrow", "evaluate": "*/*.parquet", "seqkd": "parts/*.json"}[stage]
    scratch = tmp_path / "scratch"
    whole = faults_run.run(undisturbed.folder, undisturbed.copy_without(stage, tmp_path / "whole"), scratch)
    mark = {"cache": "fsync", "evaluate": "write", "seqkd": "write"}[stage]
    end = {"cache": "/.ledger.json", "evaluate": "/.generations.parquet", "seqkd": "/.summary.json"}[stage]
    at = [index for index, event in enumerate(whole.events) if mark in event and end in event][-1 if stage == "cache" else 0]
    run_dir = undisturbed.copy_without(stage, tmp_path / "runs")
    first = faults_run.run(undisturbed.folder, run_dir, scratch, Fault(9, at))
    assert first.code == -9
    file = sorted(run_dir.glob(f"artifacts/{stage}/*.partial/{piece}"))[0]
    file.write_bytes(Damage(stage).of(file.read_bytes()))
    refused = faults_run.run(undisturbed.folder, run_dir, scratch)
    assert refused.code == 2 and str(file) in refused.log and "remove" in refused.log, refused.log
    file.unlink()
    again = faults_run.run(undisturbed.folder, run_dir, scratch)
    assert again.code == 0, again.log
    extra = sum(first.work.values()) + sum(again.work.values()) - sum(whole.work.values())
    assert extra <= (4 if stage == "cache" else 1), (first.work, again.work, whole.work)
    what = differences(undisturbed.results, results(run_dir))
    tally("one damaged piece, made again alone", not what, what)
