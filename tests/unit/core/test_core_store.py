"""The shared store: computed once on any machine, whole or not there, checked on arrival, one worker at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import lease as leases
from pipeline import remote, store
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.lease import Lease, LeaseLost
from pipeline.remote import RemoteFolder, open_remote, without_secrets
from pipeline.stages.place import Place, Work, build, build_if_free, obtain, place
from pipeline.store import VARIABLE, Store, check_store, store_from_environment

Open = Callable[[Store], RemoteFolder]


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store in the environment."""
    address = f"file://{tmp_path}/store" if request.param == "file" else f"memory://store-{uuid.uuid4().hex}"
    monkeypatch.setenv(VARIABLE, address)
    yield address
    if request.param == "memory":
        MemoryFileSystem.store.clear()


def planned(run_dir: Path, name: str = "a") -> Place:
    return place(run_dir / "artifacts", "stage", 1, f"make {name}", {"name": name}, {})


def writing(calls: list[str], text: str = "content") -> Work:
    def work(folder: Path) -> Mapping[str, Any]:
        calls.append(str(folder))
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "file.bin").write_text(text)
        (folder / "top.txt").write_text("top")
        return {"n": 2}

    return work


def never(folder: Path) -> Mapping[str, Any]:
    raise AssertionError(f"computed in {folder}")


def names(url: str, folder: str) -> list[str]:
    return sorted(open_remote(url).names(folder))


def where(artifact: Place | Artifact) -> str:
    return f"stage/{artifact.fingerprint}"


def test_the_second_run_directory_computes_nothing(tmp_path: Path, url: str) -> None:
    calls: list[str] = []
    made = build(planned(tmp_path / "one"), writing(calls))
    assert len(calls) == 1 and names(url, where(made)) == ["manifest.json", "sub", "top.txt"]
    assert names(url, f"{where(made)}.lease") == []
    fetched = build(planned(tmp_path / "two"), never)
    assert fetched.manifest == made.manifest and fetched.path != made.path
    opened = planned(tmp_path / "two").open()
    assert (opened.path / "sub" / "file.bin").read_text() == "content"
    assert sorted(file.name for file in opened.path.parent.iterdir()) == [made.fingerprint]
    assert sorted(file.name for file in opened.path.iterdir()) == ["manifest.json", "sub", "top.txt"]


def test_obtain_fetches_and_existing_stays_local(tmp_path: Path, url: str) -> None:
    assert obtain(planned(tmp_path / "one")) is None
    build(planned(tmp_path / "one"), writing([]))
    there = planned(tmp_path / "two")
    assert there.existing() is None
    fetched = obtain(there)
    assert fetched is not None and there.existing() == fetched == obtain(there)


def test_nothing_is_shared_without_a_store_and_later_it_is(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    made = build(planned(tmp_path / "one"), writing([]))
    assert store_from_environment() is None and obtain(planned(tmp_path / "two")) is None
    assert names(url, "stage") == []
    monkeypatch.setenv(VARIABLE, url)
    assert build(planned(tmp_path / "one"), never) == made
    assert build(planned(tmp_path / "two"), never).manifest == made.manifest


def test_an_artifact_with_a_fixed_place_is_not_shared(tmp_path: Path, url: str) -> None:
    fixed = place(tmp_path / "one", "compare", 1, "compare", {}, {}, tmp_path / "one" / "comparison")
    build(fixed, writing([]), replace=True)
    build(fixed, never, replace=True)
    assert names(url, "compare") == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "another"])
def test_a_damaged_artifact_in_the_store_is_refused_and_not_placed(tmp_path: Path, damage: str, url: str) -> None:
    made = build(planned(tmp_path / "one"), writing([]))
    folder = open_remote(url)
    file, manifest = f"{where(made)}/sub/file.bin", f"{where(made)}/manifest.json"
    if damage == "flip":
        folder.write(file, b"Content")
    elif damage == "truncate":
        folder.write(file, b"conten")
    elif damage == "remove":
        folder.remove(file)
    elif damage == "manifest":
        folder.write(manifest, (folder.read(manifest) or b"")[:-20])
    else:
        folder.write(manifest, json.dumps({**json.loads(folder.read(manifest) or b""), "fingerprint": "e" * 16}).encode())
    with pytest.raises(ArtifactError, match=f"{made.fingerprint}.*remove .*{made.fingerprint}/ from the store"):
        build(planned(tmp_path / "two"), never)
    assert planned(tmp_path / "two").existing() is None
    for name in [file, f"{where(made)}/top.txt", manifest]:
        folder.remove(name)
    build(planned(tmp_path / "one"), never)
    assert build(planned(tmp_path / "two"), never).manifest == made.manifest


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "sub/../../out", "a\\..\\out", "", "./top.txt", "manifest.json"])
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path, name: str, url: str) -> None:
    made = build(planned(tmp_path / "one"), writing([]))
    folder, manifest = open_remote(url), f"{where(made)}/manifest.json"
    content = json.loads(folder.read(manifest) or b"")
    folder.write(manifest, json.dumps({**content, "files": {**content["files"], name: content["files"]["top.txt"]}}).encode())
    with pytest.raises(ArtifactError, match=r"which is not inside the artifact\); remove"):
        build(planned(tmp_path / "two"), never)
    assert not list(tmp_path.glob("two/**/out")) and planned(tmp_path / "two").existing() is None


def test_an_interrupted_download_goes_on(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(planned(tmp_path / "one"), writing([]))
    download = RemoteFolder.download
    fetched: list[str] = []

    def cut_off(self: RemoteFolder, name: str, target: Path) -> None:
        if name.endswith("top.txt") and fetched == [f"{where(made)}/sub/file.bin"]:
            fetched.append("cut off")
            raise ConnectionError("no route")
        fetched.append(name)
        download(self, name, target)

    monkeypatch.setattr(store, "_TRANSFERS", 1)
    monkeypatch.setattr(RemoteFolder, "download", cut_off)
    there = planned(tmp_path / "two")
    with pytest.raises(ArtifactError, match=r"cannot fetch stage/.*no route.*run again"):
        build(there, never)
    assert there.existing() is None
    assert build(there, never).manifest == made.manifest
    assert fetched == [f"{where(made)}/sub/file.bin", "cut off", f"{where(made)}/top.txt"]


def test_what_an_interrupted_computation_left_goes_when_the_artifact_is_fetched(tmp_path: Path, url: str) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        (folder / "half").write_text("x")
        raise RuntimeError("work")

    there = planned(tmp_path / "two")
    with pytest.raises(RuntimeError, match="work"):
        build(there, fail)
    build(planned(tmp_path / "one"), writing([]))
    build(there, never)
    assert [file.name for file in there.path.parent.iterdir()] == [there.fingerprint]


def test_an_upload_that_breaks_off_shows_nothing_and_is_mended(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RemoteFolder.write

    def broken(self: RemoteFolder, name: str, content: bytes) -> None:
        if name.endswith("/manifest.json"):
            raise ConnectionError("gone")
        write(self, name, content)

    here, there = planned(tmp_path / "one"), planned(tmp_path / "two")
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "write", broken)
        with pytest.raises(ArtifactError, match=r"cannot publish stage/.*gone.*kept in the run directory"):
            build(here, writing([]))
    assert names(url, where(here)) == ["sub", "top.txt"] and obtain(there) is None
    made = build(here, never)
    assert build(there, never).manifest == made.manifest


def test_what_is_in_the_store_is_not_uploaded_again(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(planned(tmp_path / "one"), writing([]))
    monkeypatch.setattr(RemoteFolder, "upload", lambda *_: pytest.fail("uploaded again"))
    build(planned(tmp_path / "one"), never)


def test_failed_work_lets_the_lease_go(tmp_path: Path, url: str) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        (folder / "half").write_text("x")
        raise RuntimeError("work")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="work"):
            build(planned(tmp_path / "one"), fail)
    held = planned(tmp_path / "one")
    assert len(names(url, f"{where(held)}.lease")) == 1
    build(planned(tmp_path / "two"), writing([]))
    assert names(url, f"{where(held)}.lease") == []


WORKER = """
import os, sys, time
from pathlib import Path
from pipeline.stages import place as places
from pipeline.stages.place import build, place
from pipeline.store import VARIABLE, Store

run_dir, journal, seconds, lifetime = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
places.store_from_environment = lambda: Store(os.environ[VARIABLE], lifetime)

def work(folder):
    with journal.open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    time.sleep(seconds)
    (folder / "file").write_text("content")
    return {}

build(place(run_dir / "artifacts", "stage", 1, "make", {"name": "a"}, {}), work)
"""


def start(run_dir: Path, journal: Path, seconds: float, lifetime: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(run_dir), str(journal), str(seconds), str(lifetime)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def shared_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that several processes see."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return str(tmp_path / "store")


def test_of_two_processes_one_computes(tmp_path: Path, shared_url: str) -> None:
    journal = tmp_path / "journal"
    # The work takes longer than the lease lives: it is renewed.
    workers = [start(tmp_path / name, journal, 4.0, 3.0) for name in ("one", "two")]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len(journal.read_text().splitlines()) == 1
    assert all(planned(tmp_path / name).open().path.joinpath("file").exists() for name in ("one", "two"))


def test_the_lease_of_a_killed_process_is_taken_over(tmp_path: Path, shared_url: str, caplog: pytest.LogCaptureFixture) -> None:
    journal = tmp_path / "journal"
    worker = start(tmp_path / "one", journal, 60.0, 1.0)
    while not journal.exists():
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    calls: list[str] = []
    with caplog.at_level(logging.INFO):
        build(planned(tmp_path / "two"), writing(calls))
    assert len(calls) == 1
    told = [record.getMessage() for record in caplog.records if "process" in record.getMessage()]
    assert f"waiting for process {worker.pid} on" in told[0] and f"from process {worker.pid} on" in told[1]


def fell_silent(held: Lease | None) -> Lease:
    """Another process's lease, as it would be after the machine of this one slept through its lifetime."""
    assert held is not None
    folder, place_of, number = held.folder, held.where, held.number
    taken = Lease(folder, place_of, number + 1, "other", 60.0)
    assert folder.create(f"{place_of}/{number + 1:06d}.json", taken.content(0))
    return taken


def test_a_lost_lease_is_noticed_and_nothing_is_published(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    here, shared = planned(tmp_path / "one"), Store(url)
    made = build(place(tmp_path / "x" / "artifacts", "stage", 1, "make a", {"name": "a"}, {}), writing([]))
    open_remote(url).remove(f"{where(made)}/manifest.json")
    with shared.lease("stage", made.fingerprint) as held:
        assert held is not None
        held.check()
        taken = fell_silent(held)
        with pytest.raises(LeaseLost, match=r"taken over by process \d+ on .*\(number 2\)"):
            shared.publish(made, held)
    taken.check()  # the loser lets the winner's lease alone
    assert "manifest.json" not in names(url, where(made))
    taken.write(-1, released=True)

    def lose(folder: Path) -> Mapping[str, Any]:
        number = max(int(name[:6]) for name in names(url, f"stage/{here.fingerprint}.lease"))
        fell_silent(Lease(open_remote(url), f"stage/{here.fingerprint}.lease", number, "", 60.0))
        return writing([])(folder)

    with caplog.at_level(logging.WARNING):
        kept = build(here, lose)
    assert here.existing() == kept and "not shared" in caplog.text
    assert "manifest.json" not in names(url, where(made))


def test_a_lease_that_is_lost_while_files_go_up_publishes_nothing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    made = build(planned(tmp_path / "one"), writing([]))
    upload = RemoteFolder.upload
    with Store(url).lease("stage", made.fingerprint) as held:
        assert held is not None

        def slow(self: RemoteFolder, source: Path, name: str) -> None:
            upload(self, source, name)
            if name.endswith("top.txt"):
                fell_silent(held)

        monkeypatch.setattr(RemoteFolder, "upload", slow)
        with pytest.raises(LeaseLost):
            Store(url).publish(made, held)
    assert "manifest.json" not in names(url, where(made))


def test_the_renewing_thread_tells_of_a_lost_lease(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Store(url, lifetime=0.3).lease("stage", "f") as held:
        fell_silent(held)
        while "taken over by" not in caplog.text:
            time.sleep(0.02)


def test_a_renewal_that_fails_is_tried_again(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failures = Lease.write, []

    def flaky(self: Lease, beat: int, released: bool = False) -> None:
        if not failures:
            failures.append(beat)
            raise ConnectionError("no route")
        write(self, beat, released)

    monkeypatch.setattr(Lease, "write", flaky)
    with Store(url, lifetime=0.3).lease("stage", "f") as held:
        assert held is not None
        name = f"{held.where}/000001.json"
        while json.loads(held.folder.read(name) or b"")["beat"] < 2:
            time.sleep(0.02)
        held.check()
    assert "cannot renew" in caplog.text and json.loads(held.folder.read(name) or b"")["released"] is True


def test_a_lease_that_cannot_be_let_go_fails_no_work(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(self: Lease, beat: int, released: bool = False) -> None:
        raise OSError("away")

    with Store(url, lifetime=60.0).lease("stage", "f"):
        monkeypatch.setattr(Lease, "write", away)
    assert "cannot release" in caplog.text and "stage/f.lease (away); it ends by itself" in caplog.text


def test_whether_a_holder_lives_is_seen_by_its_renewals(url: str) -> None:
    with Store(url, lifetime=2.0).lease("stage", "f"):
        for wait in ("never", "sign"):
            with Store(url).lease("stage", "f", wait=wait) as second:
                assert second is None
    silent = Lease(open_remote(url), "stage/g.lease", 1, "dead", 0.3)
    assert silent.folder.create("stage/g.lease/000001.json", silent.content(0))
    with Store(url).lease("stage", "g", wait="never") as second:
        assert second is None
    with Store(url).lease("stage", "g", wait="sign") as second:
        assert second is not None and second.number == 2
        second.check()
        assert names(url, "stage/g.lease") == ["000002.json"]


def test_only_one_of_many_takes_over(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_POLL_SECONDS", 0.02)
    silent = Lease(open_remote(url), "stage/f.lease", 1, "dead", 0.3)
    silent.folder.create("stage/f.lease/000001.json", silent.content(0))
    inside, most, lock = 0, 0, threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with Store(url).lease("stage", "f"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0


def test_a_killed_runs_artifact_is_shared_by_the_next(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its commit and its upload, its lease still there."""
    with monkeypatch.context() as patch:
        patch.delenv(VARIABLE)
        made = build(planned(tmp_path / "one"), writing([]))
    dead = Lease(open_remote(url), f"{where(made)}.lease", 1, "dead", 0.3)
    dead.folder.create(f"{where(made)}.lease/000001.json", dead.content(0))
    build(planned(tmp_path / "one"), never)
    assert build(planned(tmp_path / "two"), never).manifest == made.manifest


def test_work_that_is_done_or_held_is_left_to_others(tmp_path: Path, url: str) -> None:
    here = planned(tmp_path / "one")
    with Store(url).lease("stage", here.fingerprint):
        build_if_free(here, never)
    calls: list[str] = []
    build_if_free(here, writing(calls))
    build_if_free(here, never)
    build_if_free(planned(tmp_path / "two"), never)
    assert len(calls) == 1 and planned(tmp_path / "two").existing() is None  # not fetched either: someone else may need it
    assert Store(url).has("stage", here.fingerprint)


def test_a_file_system_without_exclusive_creation_lets_the_last_writer_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_remote(str(tmp_path / "s"))
    folder = RemoteFolder(opened.fs, opened.root, opened.shown, exclusive=False)
    monkeypatch.setattr(remote.time, "sleep", lambda _: folder.write("f", b"theirs"))
    assert folder.create("f", b"mine") is False and folder.read("f") == b"theirs"
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    assert folder.create("g", b"mine") is True
    monkeypatch.setattr(remote.time, "sleep", lambda _: pytest.fail("waited for a file that is there"))
    assert folder.create("g", b"other") is False


def test_a_server_that_ignores_the_condition_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"memory://ignores-{uuid.uuid4().hex}"
    monkeypatch.setattr(remote, "_create", lambda fs, path, content: fs.pipe_file(path, content))
    monkeypatch.setenv(VARIABLE, address)
    check_store()
    assert open_remote(address).exclusive is False and "may compute an artifact twice" in caplog.text
    assert names(address, "") == []


def test_a_repeated_request_still_knows_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_remote(f"memory://retry-{uuid.uuid4().hex}")

    def twice(fs: Any, path: str, content: bytes) -> None:
        fs.pipe_file(path, content)
        raise FileExistsError(path)  # of the second request; the first one's answer was lost

    monkeypatch.setattr(remote, "_create", twice)
    assert folder.create("f", b"mine") is True


def test_a_good_store_passes_and_leaves_nothing(url: str, caplog: pytest.LogCaptureFixture) -> None:
    check_store()
    assert names(url, "") == [] and not caplog.text


def test_no_store_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "  ")
    check_store()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense://x/y", "store nonsense://x/y: cannot be opened .*use a path, file://"),
        ("s3://user:secret@bucket/x", "store s3://bucket/x: cannot be opened .*pip install s3fs"),
        ("/dev/null/store", "store /dev/null/store: cannot be read and written .*check the address"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv(VARIABLE, address)
    with pytest.raises(ConfigError, match=message) as caught:
        check_store()
    assert "secret" not in str(caught.value)


def test_passwords_are_shown_nowhere(tmp_path: Path) -> None:
    shown = without_secrets("cannot open sftp://me:pa@ss@host/dir?token=abc and more")
    assert shown == "cannot open sftp://host/dir and more"
    assert "secret" not in repr(Store("s3://key:secret@bucket"))


def test_a_store_that_goes_away_is_told(tmp_path: Path, shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_remote(shared_url)
    shutil.rmtree(shared_url)
    Path(shared_url).write_text("not a folder any more")
    with pytest.raises(ArtifactError, match=r"store .*: cannot .* stage/.*unset DISTILLLENS_STORE"):
        build(planned(tmp_path / "one"), never)
