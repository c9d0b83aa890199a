"""The hub: asked again where that can help, and nothing is used that is not what the hub announced."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import COMMIT, DATA, MODEL, REPO, Hub

from pipeline import hub as hub_module
from pipeline.errors import DataError, ModelError, PipelineError
from pipeline.hub import ATTEMPTS, HubUnavailable, fetch_file, fetch_folder, resolve_revision

PATTERNS = ["*.json", "*.safetensors"]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept; nothing is."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr("random.uniform", lambda low, high: low)
    return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hub_module._tell_once.cache_clear()
    with hub_server.running() as served:
        hub_server.use(monkeypatch, served.port, str(tmp_path / "cache"))
        yield served


def folder() -> Path:
    return fetch_folder(REPO, COMMIT, PATTERNS, "teacher")


def rows() -> Path:
    return fetch_file(REPO, "rows.jsonl", COMMIT, "data.train")


def branch() -> str:
    return resolve_revision(REPO, "main", "model", "teacher")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


USES: list[Callable[[], Any]] = [folder, rows, branch]


def test_a_hub_that_works_is_asked_once(hub: Hub, waits: list[float]) -> None:
    assert branch() == COMMIT
    assert contents(folder()) == MODEL and rows().read_bytes() == DATA["rows.jsonl"]
    assert hub.downloads == 3 and not waits


def test_a_branch_is_asked_for_again_with_longer_and_longer_breaks(hub: Hub, waits: list[float]) -> None:
    hub.statuses = [500, 502, 503, 504]
    assert branch() == COMMIT
    assert waits == [1.0, 2.0, 4.0, 8.0] and len(hub.requests) == ATTEMPTS


def test_the_breaks_differ_between_processes(hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    hub.statuses = [500, 500]
    branch()
    assert waits == [1.25, 2.5]


def test_the_break_is_what_the_hub_asks_for_within_reason(hub: Hub, waits: list[float]) -> None:
    hub.statuses, hub.retry_after = [429], "37"
    branch()
    hub.statuses, hub.retry_after = [429], "86400"
    branch()
    hub.statuses, hub.retry_after = [429], "tomorrow"
    branch()
    assert waits == [37.0, 300.0, 1.0]


@pytest.mark.parametrize("use", USES)
def test_a_file_comes_after_an_outage(use: Callable[[], Any], hub: Hub) -> None:
    hub.statuses = [503, 500]
    use()


@pytest.mark.parametrize("use", USES)
def test_an_outage_ends_in_one_message(use: Callable[[], Any], hub: Hub, waits: list[float]) -> None:
    hub.always = 503
    with pytest.raises(HubUnavailable) as raised:
        use()
    message = str(raised.value)
    what = "data.train" if use is rows else "teacher"
    assert message.startswith(f"{what}: cannot ") and raised.value.exit_code == 1
    for part in (REPO, f"127.0.0.1:{hub.port}", "HTTP status 503", f"asked {ATTEMPTS} times", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        assert part in message
    assert f"--set {what}='{{kind: local, path: PATH}}'" in message and "\n" not in message
    assert len(waits) >= ATTEMPTS - 1


@pytest.mark.parametrize("use", USES)
def test_a_hub_that_refuses_connections_is_an_outage(
    use: Callable[[], Any], hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub_server.use(monkeypatch, free.getsockname()[1], str(tmp_path / "cache"))
    with pytest.raises(HubUnavailable, match=rf"does not answer \(.*Connection refused.*asked {ATTEMPTS} times"):
        use()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, None, "HF_TOKEN"),
        (403, None, "set HF_TOKEN to a token that may read"),
        (403, "GatedRepo", "accept its licence at https://"),
        (404, "RepoNotFound", "there is no such repository, or it is private"),
        (404, "RevisionNotFound", "has no such revision"),
    ],
)
def test_a_refusal_is_not_asked_again(
    status: int, code: str | None, message: str, use: Callable[[], Any], hub: Hub, waits: list[float]
) -> None:
    hub.always, hub.error_code = status, code
    with pytest.raises(DataError if use is rows else ModelError, match=message) as raised:
        use()
    assert REPO in str(raised.value) and raised.value.exit_code == 2
    assert not waits


def test_a_file_that_is_not_there_is_named(hub: Hub, waits: list[float]) -> None:
    with pytest.raises(DataError, match=r"data.dev: cannot fetch no.jsonl of owner/name@c+ \(there is no such file\)"):
        fetch_file(REPO, "no.jsonl", COMMIT, "data.dev")
    assert not waits


@pytest.mark.parametrize("use", USES)
def test_offline_without_a_copy_says_so(
    use: Callable[[], Any], hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_server.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_server.huggingface_hub.close_session()
    with pytest.raises(PipelineError, match="HF_HUB_OFFLINE is set, and this machine has no copy of it") as raised:
        use()
    assert raised.value.exit_code == 2 and not waits and not hub.requests


def test_what_was_fetched_needs_no_hub(hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    first, file = folder(), rows()
    hub.always = 503
    assert folder() == first and rows() == file
    assert not waits


def test_a_branch_is_taken_as_last_seen_without_a_wait(hub: Hub, waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "config.json", revision="main")
    hub.always = 503
    assert branch() == branch() == COMMIT
    assert not waits
    assert [record.getMessage().partition("\n")[2] for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{REPO}@main: going on with commit {COMMIT}, as this machine last saw it"
    ]


# Files that are not what they should be


@pytest.mark.parametrize("use", [folder, rows])
def test_a_body_that_is_cut_is_resumed(use: Callable[[], Path], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server.huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10)
    monkeypatch.setitem(MODEL, "config.json", b"")
    hub.cut = 1
    path = use()
    found = contents(path) if path.is_dir() else path.read_bytes()
    assert found == (MODEL if use is folder else DATA["rows.jsonl"])
    assert len(hub.ranges) == 1


@pytest.mark.parametrize("use", [folder, rows])
def test_a_body_that_never_comes_whole_is_not_used(
    use: Callable[[], Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL, "model.safetensors", b"")  # a body of no bytes is whole
    hub.cut = 10**6
    with pytest.raises(HubUnavailable, match="does not answer"):
        use()
    cached = [file for file in (tmp_path / "cache").rglob("blobs/*") if file.stat().st_size]
    assert not cached
    hub.cut = 0
    assert use().exists()


@pytest.mark.parametrize("use", [folder, rows])
def test_a_corrupted_body_is_fetched_again(use: Callable[[], Path], hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.corrupt = 1
    path = use()
    found = contents(path) if path.is_dir() else path.read_bytes()
    assert found == (MODEL if use is folder else DATA["rows.jsonl"])
    assert "damaged in the hub cache" in caplog.text


@pytest.mark.parametrize("use", [folder, rows])
def test_a_body_that_stays_corrupted_is_never_used(use: Callable[[], Path], hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = 10**6
    for _ in range(2):
        with pytest.raises(HubUnavailable, match="is not what it announces"):
            use()
    hub.corrupt = 0
    path = use()
    found = contents(path) if path.is_dir() else path.read_bytes()
    assert found == (MODEL if use is folder else DATA["rows.jsonl"])


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"x" + content[1:], lambda content: b""])
def test_damage_in_the_cache_is_found_and_mended(damage: Callable[[bytes], bytes], hub: Hub) -> None:
    for name in MODEL:
        file = (folder() / name).resolve()
        file.write_bytes(damage(file.read_bytes()))
        assert contents(folder()) == MODEL
    file = rows().resolve()
    file.write_bytes(damage(file.read_bytes()))
    assert rows().read_bytes() == DATA["rows.jsonl"]


def test_damage_in_the_cache_is_an_error_where_the_hub_is_away(hub: Hub) -> None:
    file = (folder() / "model.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:-1])
    hub.always = 503
    for _ in range(2):
        with pytest.raises(PipelineError, match="teacher: cannot fetch owner/name@"):
            folder()


def test_a_file_is_read_once_to_be_checked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = hub_module._is_whole
    monkeypatch.setattr(hub_module, "_is_whole", lambda blob: read.append(blob) or whole(blob))
    folder()
    assert len(read) == len(MODEL)
    folder()
    assert len(read) == len(MODEL)


def test_a_cache_that_cannot_be_written_is_checked_each_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, text: str) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(hub_module, "write_text_atomically", refused)
    folder()
    file = (folder() / "config.json").resolve()
    file.write_bytes(b"{}")
    assert contents(folder()) == MODEL
