"""Symbolic links: followed where a user places them, never where someone else's artifact, store or hub snapshot has them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from rows import read_examples

from pipeline.artifacts import MANIFEST, Artifact, artifact_path, commit, find, open_or_fail, partial_folder, peek
from pipeline.data.sources import HubSource
from pipeline.errors import ArtifactError
from pipeline.hub import in_cache
from pipeline.models.load import fetch, locate_hub
from pipeline.store import Store

IDENTITY = "0123456789abcdef"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def made(root: Path, identity: str = IDENTITY) -> Artifact:
    final = artifact_path(root, "train", identity)
    with partial_folder(final) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "a.txt").write_text("content")
        return commit(
            folder, final, stage="train", fingerprint=identity, recipe={}, upstream={}, counts={}, seconds=0.0
        )  # fmt: skip


def refused(artifact: Artifact) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_or_fail(artifact.path, IDENTITY)
    return str(caught.value)


def test_a_run_directory_and_the_folders_in_it_may_be_links(tmp_path: Path) -> None:
    made(tmp_path / "disk")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert find(artifact_path(tmp_path / "runs", "train", IDENTITY), IDENTITY) is not None
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "train" / IDENTITY).symlink_to(artifact_path(tmp_path / "disk", "train", IDENTITY))
    assert find(artifact_path(tmp_path / "other", "train", IDENTITY), IDENTITY) is not None


@pytest.mark.parametrize("name", ["model/a.txt", "model", "extra.json", "model/generation_config.json", MANIFEST])
def test_no_link_in_an_artifact_leads_out_of_it(tmp_path: Path, name: str) -> None:
    """Also to a file with the very same content, and also of names that no manifest has: libraries look for some of them."""
    artifact = made(tmp_path)
    inside, outside = artifact.path / name, tmp_path / "outside"
    if inside.exists():
        inside.rename(outside)
    else:
        outside.write_text("{}")
    inside.symlink_to(outside)
    message = refused(artifact)
    assert (
        str(inside) in message and "a symbolic link out of the artifact" in message and "put the file itself there" in message
    )


def test_links_inside_an_artifact_are_its_own_business(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    (artifact.path / "again").symlink_to("model/a.txt")
    assert find(artifact.path, IDENTITY) is not None


def test_a_link_in_a_circle_is_one_message(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    (artifact.path / "model" / "a.txt").unlink()
    (artifact.path / "model" / "a.txt").symlink_to("a.txt")
    assert "expected 7 bytes, found no file" in refused(artifact)


def rewritten(artifact: Artifact, **changes: Any) -> None:
    """A manifest without a seal, as an earlier version wrote it."""
    content = {**asdict(artifact.manifest), "sealed_by": "0" * 64, **changes}
    (artifact.path / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "a\\b", "a\0b", "", ".", "a//b", MANIFEST])
def test_a_manifest_names_nothing_outside(tmp_path: Path, name: str) -> None:
    artifact = made(tmp_path)
    rewritten(artifact)
    assert find(artifact.path, IDENTITY) is not None
    rewritten(artifact, files={name: {"bytes": 0, "sha256": "0" * 64}})
    assert "which is not inside the artifact" in refused(artifact) and peek(artifact.path) is None


@pytest.mark.parametrize("files", [[], {"a": None}, {"a": {}}, {"a": {"bytes": 1}}, 3, None])
def test_a_manifest_of_another_form_is_one_message(tmp_path: Path, files: Any) -> None:
    artifact = made(tmp_path)
    rewritten(artifact, files=files)
    assert "not a manifest" in refused(artifact)


def test_a_manifest_nested_without_end_is_one_message(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    (artifact.path / MANIFEST).write_text("[" * 200_000)
    assert "not a manifest" in refused(artifact)


# The shared store


def shared_store(tmp_path: Path) -> tuple[Store, Path]:
    made(tmp_path / "store")
    return Store(str(tmp_path / "store")), artifact_path(tmp_path / "store", "train", IDENTITY)


def not_fetched(store: Store, tmp_path: Path) -> str:
    target = artifact_path(tmp_path / "runs", "train", IDENTITY)
    with pytest.raises(ArtifactError) as caught:
        store.fetch("train", IDENTITY, target)
    assert not target.exists()
    return str(caught.value)


@pytest.mark.parametrize("link", ["model/a.txt", "model", MANIFEST, "."])
def test_no_link_in_a_shared_store_leads_out_of_it(tmp_path: Path, link: str) -> None:
    store, folder = shared_store(tmp_path)
    inside, outside = folder / link, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    message = not_fetched(store, tmp_path)
    assert "leads out of the store by a symbolic link; remove the link there" in message and str(tmp_path / "store") in message


def test_nothing_is_written_out_of_a_shared_store(tmp_path: Path) -> None:
    artifact = made(tmp_path / "runs")
    (tmp_path / "store").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "store" / "train").symlink_to(tmp_path / "outside")
    store = Store(str(tmp_path / "store"))
    with pytest.raises(ArtifactError, match="leads out of the store"), store.lease("train", IDENTITY) as lease:
        assert lease is not None
        store.publish(artifact, lease)
    assert not list((tmp_path / "outside").iterdir())


def test_the_store_itself_may_be_a_link(tmp_path: Path) -> None:
    store, _ = shared_store(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    fetched = Store(str(tmp_path / "link")).fetch("train", IDENTITY, artifact_path(tmp_path / "runs", "train", IDENTITY))
    assert fetched is not None and store.has("train", IDENTITY)


def test_a_manifest_in_the_store_is_what_was_sealed(tmp_path: Path) -> None:
    store, folder = shared_store(tmp_path)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"seconds": 0.0', '"seconds": 1.0'))
    message = not_fetched(store, tmp_path)
    assert "its checksum differs" in message and "from the store and run again" in message
    (folder / MANIFEST).write_text(text)
    assert store.fetch("train", IDENTITY, artifact_path(tmp_path / "runs", "train", IDENTITY)) is not None


# The hub cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot as the hub's client keeps it: links to blobs."""
    hub = tmp_path / "hub"
    snapshot = hub / "datasets--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = hub / "datasets--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text('{"instruction": "say hello", "output": "hello"}\n')
    (snapshot / "rows.jsonl").symlink_to("../../blobs/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(snapshot / "rows.jsonl"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    return snapshot


def test_links_into_the_hub_cache_are_followed(cache: Path) -> None:
    assert read_examples(HubSource("a/b", "rows.jsonl", COMMIT))[0].instruction == "say hello"
    assert fetch(locate_hub("a/b", COMMIT), "teacher") == cache


def test_links_out_of_the_hub_cache_are_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "secret").write_text('{"instruction": "say hello", "output": "hello"}\n')
    (cache / "rows.jsonl").unlink()
    (cache / "rows.jsonl").symlink_to(tmp_path / "secret")
    for use in (
        lambda: read_examples(HubSource("a/b", "rows.jsonl", COMMIT)),
        lambda: fetch(locate_hub("a/b", COMMIT), "teacher"),
        lambda: in_cache(cache, "teacher"),
    ):
        with pytest.raises(ArtifactError, match=r"rows.jsonl leads out of the hub cache .*; remove it and run again"):
            use()
