"""Artifacts: identity, atomic commit, damage detected."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.artifacts import Artifact, commit, find, fingerprint, open_or_fail, partial_folder
from pipeline.errors import ArtifactError
from pipeline.locks import exclusive


def make(path: Path, identity: str = "f" * 16, text: str = "content") -> Artifact:
    with partial_folder(path) as folder:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "file.txt").write_text(text)
        return commit(folder, path, stage="s", fingerprint=identity, recipe={"a": 1}, upstream={}, counts={"n": 2}, seconds=0.5)


def test_the_fingerprint_depends_on_everything_and_on_no_order() -> None:
    base = fingerprint("s", 1, {"a": 1, "b": 2}, {"u": "x"})
    assert base == fingerprint("s", 1, {"b": 2, "a": 1}, {"u": "x"})
    others = [
        ("t", 1, {"a": 1, "b": 2}, {"u": "x"}),
        ("s", 2, {"a": 1, "b": 2}, {"u": "x"}),
        ("s", 1, {"a": 1}, {"u": "x"}),
        ("s", 1, {"a": 1, "b": 2}, {"u": "y"}),
    ]
    assert len({base, *(fingerprint(*other) for other in others)}) == 5


def test_a_committed_artifact_is_found_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "s" / "x"
    assert find(path, "f" * 16) is None
    made = make(path)
    opened = open_or_fail(path, "f" * 16)
    assert opened == made and opened.manifest.counts == {"n": 2}
    assert list(opened.manifest.files) == ["sub/file.txt"]
    assert not path.with_name("x.partial").exists() and not path.with_name("x.lock").exists()


def test_another_fingerprint_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(ArtifactError, match="expected eeee"):
        find(tmp_path / "x", "e" * 16)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "incomplete"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x"
    make(path)
    file, manifest = path / "sub" / "file.txt", path / "manifest.json"
    if damage == "truncate":
        file.write_text("conten")
    elif damage == "flip":
        file.write_text("Content")
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    with pytest.raises(ArtifactError, match=str(path)):
        open_or_fail(path, "f" * 16)


def test_a_failed_build_leaves_its_folder_to_go_on_from_and_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(RuntimeError), partial_folder(path) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert find(path, "f" * 16) is None
    with partial_folder(path) as folder:
        assert (folder / "half").exists()


def test_a_rebuilt_artifact_replaces_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "x", "a" * 16, "old")
    make(tmp_path / "x", "b" * 16, "new")
    assert (open_or_fail(tmp_path / "x", "b" * 16).path / "sub" / "file.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_a_file_is_durable_before_its_manifest_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(artifacts.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    make(tmp_path / "x")
    names = [Path(name).name for name in synced]
    assert names.index("file.txt") < next(i for i, name in enumerate(names) if "manifest" in name)
    assert Path(synced[-1]) == tmp_path


def test_what_is_replaced_goes_when_the_new_name_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x", "a" * 16)
    events: list[str] = []
    fsync, rmtree = os.fsync, artifacts.shutil.rmtree
    monkeypatch.setattr(
        artifacts.os, "fsync", lambda fd: (events.append(f"sync {os.readlink(f'/proc/self/fd/{fd}')}"), fsync(fd))[1]
    )
    monkeypatch.setattr(artifacts.shutil, "rmtree", lambda path, **_: (events.append(f"remove {path}"), rmtree(path))[1])
    monkeypatch.setattr(artifacts.os, "rename", lambda old, new: (events.append(f"rename {new}"), os.replace(old, new))[1])
    (tmp_path / "x.discarded").mkdir()
    make(tmp_path / "x", "b" * 16)
    assert events[-3:] == [f"rename {tmp_path / 'x'}", f"sync {tmp_path}", f"remove {tmp_path / 'x.discarded'}"]


def test_new_folders_above_an_artifact_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(artifacts.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    make(tmp_path / "runs" / "stage" / "x")
    assert synced[:2] == [str(tmp_path), str(tmp_path / "runs")]


def test_a_file_system_that_syncs_no_folders_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(artifacts.os, "fsync", refuse)
    assert open_or_fail(make(tmp_path / "x").path)
    monkeypatch.setattr(artifacts.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        make(tmp_path / "y")


def _hold(path: Path, seconds: float) -> None:
    with exclusive(path):
        time.sleep(seconds)


def test_a_lock_waits_for_its_living_owner(tmp_path: Path) -> None:
    lock = tmp_path / "l"
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(lock, 1.5))
    process.start()
    while not lock.exists():
        time.sleep(0.01)
    with pytest.raises(ArtifactError, match=str(process.pid)), exclusive(lock, wait_seconds=0):
        pass
    with exclusive(lock):
        assert not process.is_alive() or process.join(5) is None
    process.join()
    assert not lock.exists()


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / "l"
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(lock, 60))
    process.start()
    while not lock.exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    with exclusive(lock, wait_seconds=0):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    lock = tmp_path / "l"
    with exclusive(lock):
        content = json.loads(lock.read_text())
    lock.write_text(json.dumps({**content, "start": "1"}))
    with exclusive(lock, wait_seconds=0):
        pass
