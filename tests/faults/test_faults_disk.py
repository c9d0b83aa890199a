"""A disk that cannot be written: one message, nothing lost, and the next run goes on. What is durable before what."""

from __future__ import annotations

import os
from pathlib import Path

import faults_run
import pytest
import tiny
import torch
from faults_results import differences, results
from faults_run import STAGES, Fault
from faults_setup import ALL, Tally, Undisturbed

from pipeline.models.lens import logit_lens
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Progress
from pipeline.training.optim import adamw
from pipeline.training.step import Student

STAGES_TRIED = STAGES if ALL else ("cache", "train")
LIMITS = (0, 300, 3_000) if ALL else (300,)


def next_run(undisturbed: Undisturbed, run_dir: Path, scratch: Path) -> str:
    """What is wrong after a run without the fault."""
    again = faults_run.run(undisturbed.folder, run_dir, scratch)
    return again.log if again.code else differences(undisturbed.results, results(run_dir))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("stage", STAGES_TRIED)
def test_no_room_for_larger_files(stage: str, limit: int, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    run_dir, scratch = undisturbed.copy_without(stage, tmp_path / "runs"), tmp_path / "scratch"
    ended = faults_run.run(undisturbed.folder, run_dir, scratch, Fault(file_bytes=limit))
    said = ended.code == 2 and "annot write" in ended.log and "File too large" in ended.log
    what = next_run(undisturbed, run_dir, scratch) if said else f"code {ended.code}: {ended.log}"
    tally(f"no room in {stage}", not what, what)


@pytest.mark.parametrize("stage", STAGES_TRIED)
def test_a_folder_that_may_not_be_written(stage: str, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    own = [folder for folder in tmp_path.parents if folder.name.startswith(("pytest-", "popen-"))]
    for folder in (tmp_path, *own):  # another user has to come in
        folder.chmod(0o755)
    run_dir, scratch = undisturbed.copy_without(stage, tmp_path / "runs"), tmp_path / "scratch"
    target = run_dir / "tiny" if stage == "compare" else run_dir / "artifacts" / stage
    for file in run_dir.rglob("*.safetensors"):
        file.chmod(0o644)  # written for its owner alone
    target.chmod(0o555)
    ended = faults_run.run(undisturbed.folder, run_dir, scratch, Fault(powerless=True))
    target.chmod(0o755)
    said = ended.code == 2 and "cannot write here (Permission denied" in ended.log and str(target) in ended.log
    what = next_run(undisturbed, run_dir, scratch) if said else f"code {ended.code}: {ended.log}"
    tally(f"read-only folder in {stage}", not what, what)


def test_every_file_is_durable_before_its_folder_gets_its_name(undisturbed: Undisturbed, tally: Tally) -> None:
    """Of every commit: all files synced, then the folder, then the rename, then its parent."""
    commits = 0
    for index, event in enumerate(undisturbed.events):
        what, _, name = event.partition(" ")
        folder = undisturbed.run_dir / name[1:]
        if what != "os.rename" or not (folder / "manifest.json").exists():
            continue
        partial, made = f"{name}.partial", [str(file.relative_to(folder)) for file in folder.rglob("*")]
        synced = {f"fsync {partial}", *(f"fsync {partial}/{file}" for file in made if file != "manifest.json")}
        missing = synced - set(undisturbed.events[:index])
        after = undisturbed.events[index + 1] == f"fsync {name.rpartition('/')[0]}"
        tally("rename of an artifact", not missing and after, f"{name}: not durable before or after: {missing}, {after}")
        commits += 1
    assert commits == len(list(undisturbed.run_dir.rglob("manifest.json"))) > 10


def test_a_checkpoint_is_durable_before_the_last_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    model = tiny.llama(layers=1, width=16)
    student = Student(model, logit_lens(model))
    optimizer = adamw(student.modules, 1e-3, 0.01, (0.9, 0.999))
    folder, events = tmp_path / "checkpoint", []
    checkpoint.save(folder, student, optimizer, Progress(step=1))
    fsync, rename, rmtree = os.fsync, os.rename, checkpoint.shutil.rmtree

    def name(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)

    monkeypatch.setattr(os, "fsync", lambda number: (events.append(f"sync {name(number)}"), fsync(number))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(a).name} {Path(b).name}"), rename(a, b))[1])
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **kw: (events.append(f"remove {path.name}"), rmtree(path, **kw))[1]
    )
    checkpoint.save(folder, student, optimizer, Progress(step=2))
    given = events.index("rename checkpoint.fresh checkpoint")
    files = {f"sync checkpoint.fresh/{name}" for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors")}
    sound = files <= set(events[:given]) and "sync checkpoint.fresh" in events[:given]
    sound = sound and events[given + 1 :] == ["sync .", "remove checkpoint.old"]
    tally("rename of a checkpoint", sound, str(events))


def test_a_rename_that_was_lost_leaves_the_last_checkpoint(tmp_path: Path, tally: Tally) -> None:
    """What a power failure can leave: the new checkpoint under its first name, the old one under its second."""
    model = tiny.llama(layers=1, width=16)
    student = Student(model, logit_lens(model))
    optimizer = adamw(student.modules, 1e-3, 0.01, (0.9, 0.999))
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, student, optimizer, Progress(step=1))
    folder.rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.fresh").mkdir()
    (tmp_path / "checkpoint.fresh" / "state.json").write_text("{")
    found = checkpoint.load_state(folder, optimizer)
    tally("lost rename of a checkpoint", found is not None and found.step == 1, str(found))
    torch.manual_seed(0)
    # A kill while the next one is written must not touch the only whole one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, student, optimizer, Progress(step=2))
    found = checkpoint.load_state(folder, optimizer)
    tally("lost rename of a checkpoint", found is not None and found.step == 1, str(found))
