"""A disk that cannot be written: one message, nothing lost, and the next run goes on. What is durable before what."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults_run
import pytest
import tiny
import torch
from faults_results import differences, results
from faults_run import CONTEXT, STAGES, Fault, Process
from faults_setup import ALL, Tally, Undisturbed

from pipeline.models.lens import logit_lens
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Progress
from pipeline.training.optim import adamw
from pipeline.training.step import Student

STAGES_TRIED = STAGES if ALL else ("cache", "train")
LIMITS = (0, 300, 3_000) if ALL else (300,)
FREE_KIB = (0, 4, 16, 64, 256) if ALL else (8,)


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


# A disk of its own


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory, which can be full and read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here ({made.stderr.decode().strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(disk: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("stage", STAGES_TRIED)
def test_a_disk_that_is_full(stage: str, disk: Path, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    failed = 0
    for free in FREE_KIB:
        run_dir, scratch = undisturbed.copy_without(stage, disk / f"runs-{free}"), tmp_path / "scratch"
        used = shutil.disk_usage(disk).used // 1024
        assert remount(disk, f"size={used + free}k")
        ended = faults_run.run(undisturbed.folder, run_dir, scratch)
        full = "annot write" in ended.log and "No space left on device" in ended.log and "run the same command" in ended.log
        foreseen = "are free there; free some space" in ended.log  # a cache knows what it will take
        said = ended.code == 2 and (full or foreseen) and str(run_dir) in ended.log
        failed += said
        assert remount(disk, "size=256m")
        what = next_run(undisturbed, run_dir, scratch) if said or ended.code == 0 else f"code {ended.code}: {ended.log}"
        tally(f"full disk in {stage}", not what, f"{free} KiB free: {what}")
        shutil.rmtree(run_dir)
    assert failed  # otherwise there was room


@pytest.mark.parametrize("stage", STAGES_TRIED)
def test_a_disk_that_becomes_read_only(stage: str, disk: Path, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    run_dir, scratch = undisturbed.copy_without(stage, disk / "runs"), tmp_path / "scratch"
    for at_once in (True, False):
        process = None if at_once else Process(undisturbed.folder, run_dir, scratch)
        # Refused while a file is open for writing.
        while not remount(disk, "ro") and process is not None and not process.wait_until(0.005):
            pass
        ended = faults_run.run(undisturbed.folder, run_dir, scratch) if process is None else process.wait()
        said = ended.code == 2 and "annot write" in ended.log and "Read-only file system" in ended.log
        assert remount(disk, "rw")
        tally(f"read-only disk in {stage}", said or (not at_once and ended.code == 0), f"code {ended.code}: {ended.log}")
    what = next_run(undisturbed, run_dir, scratch)
    tally(f"read-only disk in {stage}", not what, what)


# What is durable before what


def _watched(folder: Path, run_dirs: list[Path], store: Path, told: Path) -> None:
    """Run everything, and again from the store; tell the renames of what was not on disk, or whose folder never was."""
    synced: dict[int, tuple[int, int]] = {}
    pending: dict[int, str] = {}
    wrong: list[str] = []
    count = 0
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def state(at: os.stat_result) -> tuple[int, int]:
        return at.st_mtime_ns, at.st_size

    def syncing(number: int) -> None:
        fsync(number)
        at = os.fstat(number)
        synced[at.st_ino] = state(at)
        pending.pop(at.st_ino, None)

    def renaming(real: Callable[[Any, Any], None], old: Any, new: Any) -> None:
        nonlocal count
        real(old, new)
        target = Path(new)
        count += 1
        for path in (target, *target.rglob("*")):
            at = path.stat()
            if synced.get(at.st_ino) != state(at):
                wrong.append(f"{path} as a part of {target}")
        pending[target.parent.stat().st_ino] = str(target)

    os.fsync = syncing  # type: ignore[assignment]
    os.rename = lambda old, new: renaming(rename, old, new)  # type: ignore[assignment]
    os.replace = lambda old, new: renaming(replace, old, new)  # type: ignore[assignment]
    faults_run._count_work(Path(os.devnull))
    os.environ["DISTILLLENS_STORE"] = str(store)
    for run_dir in run_dirs:
        faults_run.run_all(faults_run.planned(folder, run_dir))
    told.write_text(json.dumps({"renames": count, "wrong": wrong, "never": list(pending.values())}))


def test_everything_is_durable_before_it_is_renamed_and_its_folder_after(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    """Artifacts, checkpoints, models, shards, ledgers, parts, and what is shared."""
    told, run_dirs = tmp_path / "told", [tmp_path / "runs", tmp_path / "fetched"]
    process = CONTEXT.Process(target=_watched, args=(undisturbed.folder, run_dirs, tmp_path / "store", told))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = json.loads(told.read_text())
    sound = not found["wrong"] and not found["never"]
    tally("rename of anything", sound, "\n".join([*found["wrong"], *found["never"]]), times=found["renames"])
    assert found["renames"] > 50
    assert not differences(undisturbed.results, results(run_dirs[1]))


@pytest.mark.parametrize("stage", STAGES if ALL else ("train",))
def test_a_rename_that_was_lost_leaves_all_work_done(
    stage: str, undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    run_dir = tmp_path / "runs"
    shutil.copytree(undisturbed.run_dir, run_dir)
    for artifact in finished(run_dir, stage):
        artifact.rename(artifact.with_name(f"{artifact.name}.partial"))
    again = faults_run.run(undisturbed.folder, run_dir, tmp_path / "scratch")
    what = again.log if again.code else differences(undisturbed.results, results(run_dir))
    tally(f"lost rename in {stage}", not what, what)


@pytest.mark.parametrize("place", ["under its name", "before its rename"])
@pytest.mark.parametrize("stage", STAGES if ALL else ("train",))
def test_files_without_their_content_are_noticed(
    stage: str, place: str, undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    """What a file system that breaks its promise leaves: names, and nothing in the files."""
    run_dir, scratch = tmp_path / "runs", tmp_path / "scratch"
    shutil.copytree(undisturbed.run_dir, run_dir)
    for artifact in finished(run_dir, stage):
        for file in artifact.rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
        if place == "before its rename":
            artifact.rename(artifact.with_name(f"{artifact.name}.partial"))
    for _ in range(20):
        ended = faults_run.run(undisturbed.folder, run_dir, scratch)
        if ended.code == 0:
            break
        told = [folder for folder in run_dir.rglob("*") if folder.is_dir() and f"remove {folder}" in ended.log]
        named = [file.parent for file in run_dir.rglob("*") if file.is_file() and f"{file}:" in ended.log]
        if ended.code != 2 or not (told or named):
            break
        shutil.rmtree(max([*told, *named], key=lambda folder: len(folder.parts)))
    what = ended.log if ended.code else differences(undisturbed.results, results(run_dir))
    tally(f"lost content in {stage}", not what, f"code {ended.code}: {what}")


def finished(run_dir: Path, stage: str) -> list[Path]:
    """The artifacts of a stage."""
    folder = run_dir / "tiny" / "comparison" if stage == "compare" else run_dir / "artifacts" / stage
    return [folder] if stage == "compare" else [each for each in folder.iterdir() if each.is_dir()]


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
