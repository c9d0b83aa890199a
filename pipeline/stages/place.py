"""A planned artifact: what it will be, where it goes, and how it is built, reused or fetched from the shared store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, artifact_path, commit, find, fingerprint, open_or_fail, partial_folder, peek
from pipeline.lease import Lease, LeaseLost
from pipeline.locks import held, lock_path
from pipeline.store import Store, store_from_environment

log = logging.getLogger(__name__)
MODEL = "model"
"""The folder of a trained model inside its artifact."""
Work = Callable[[Path], Mapping[str, Any]]
"""Fills a folder and returns counts."""


@dataclass(frozen=True)
class Place:
    """One artifact before it exists.

    Attributes:
        stage: name of the stage.
        label: what people read, for example "train distilllens s10".
        path: where the artifact goes.
        fingerprint: see `pipeline.artifacts.fingerprint`.
        recipe: settings and input digests.
        upstream: name → fingerprint of inputs.
    """

    stage: str
    label: str
    path: Path
    fingerprint: str
    recipe: Mapping[str, Any] = field(repr=False)
    upstream: Mapping[str, str] = field(repr=False)

    def existing(self) -> Artifact | None:
        """The finished artifact, if it is in the run directory; the shared store is not asked, see `obtain`."""
        return find(self.path, self.fingerprint)

    def open(self) -> Artifact:
        """The finished artifact with its checksums verified.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        return open_or_fail(self.path, self.fingerprint)


def place(
    root: Path,
    stage: str,
    version: int,
    label: str,
    recipe: Mapping[str, Any],
    upstream: Mapping[str, str],
    path: Path | None = None,
) -> Place:
    """Plan an artifact under an artifact root, or at `path` if it has a fixed place."""
    identity = fingerprint(stage, version, recipe, upstream)
    return Place(stage, label, path or artifact_path(root, stage, identity), identity, recipe, upstream)


def build(planned: Place, work: Work, replace: bool = False) -> Artifact:
    """Reuse the planned artifact, or fetch it, or do the work in a folder beside its place, commit it and share it.

    Where there is a shared store (see `pipeline.store`), no two machines do the work at once, and what this one has
    that the store has not is uploaded.

    Args:
        planned: the artifact.
        work: fills the folder it is given and returns counts; called again after a failure, it finds what it left there.
        replace: the place is fixed (not content-addressed), so an artifact with another fingerprint there is outdated; such
            an artifact belongs to one run directory and is not shared.
    """
    store = None if replace else store_from_environment()
    if not (replace and _outdated(planned)):
        existing = planned.existing()
        if existing is not None:
            log.info("%s: reused (%s)", planned.label, planned.fingerprint)
            if store is not None:
                _share(store, existing)
            return existing
    if store is None:
        return _make(planned, work, replace)
    fetched = store.fetch(planned.stage, planned.fingerprint, planned.path)
    if fetched is not None:
        return fetched
    with store.lease(planned.stage, planned.fingerprint) as lease:
        # The process that this one waited for may have shared it.
        artifact = store.fetch(planned.stage, planned.fingerprint, planned.path) or _make(planned, work, replace)
        _publish(store, artifact, lease)
    return artifact


def build_if_free(planned: Place, work: Work) -> None:
    """Build the artifact, unless it is finished here or in the shared store, or another process is at work on it."""
    store = store_from_environment()
    if held(lock_path(planned.path)) or planned.existing() is not None:
        return
    if store is None:
        _make(planned, work, replace=False)
    elif not store.has(planned.stage, planned.fingerprint):
        with store.lease(planned.stage, planned.fingerprint, wait="never") as lease:
            if lease is not None and not store.has(planned.stage, planned.fingerprint):
                _publish(store, _make(planned, work, replace=False), lease)


def obtain(planned: Place) -> Artifact | None:
    """The finished artifact from the run directory, or fetched from the shared store; None if neither has it."""
    existing, store = planned.existing(), store_from_environment()
    if existing is not None or store is None:
        return existing
    return store.fetch(planned.stage, planned.fingerprint, planned.path)


def _make(planned: Place, work: Work, replace: bool) -> Artifact:
    with partial_folder(planned.path) as folder:
        if not replace and (existing := planned.existing()) is not None:
            return existing  # another process finished it while this one waited for the lock
        started = time.monotonic()
        counts = work(folder)
        return commit(
            folder, planned.path, stage=planned.stage, fingerprint=planned.fingerprint, recipe=planned.recipe,
            upstream=planned.upstream, counts=counts, seconds=time.monotonic() - started,
        )  # fmt: skip


def _share(store: Store, artifact: Artifact) -> None:
    """Upload what an earlier run made without the store, or was ended before it could upload."""
    stage, identity = artifact.manifest.stage, artifact.fingerprint
    if not store.has(stage, identity):
        # A killed run's lease ends by itself; a living process makes the artifact too, and will share its own.
        with store.lease(stage, identity, wait="sign") as lease:
            if lease is not None:
                _publish(store, artifact, lease)


def _publish(store: Store, artifact: Artifact, lease: Lease | None) -> None:
    assert lease is not None  # it was waited for
    try:
        store.publish(artifact, lease)
    except LeaseLost as error:
        # Complete and usable here; the process that holds the lease now shares its own.
        log.warning("%s: not shared: %s", artifact.path, error)


def _outdated(planned: Place) -> bool:
    manifest = peek(planned.path)
    return planned.path.exists() and (manifest is None or manifest.fingerprint != planned.fingerprint)
