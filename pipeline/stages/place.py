"""A planned artifact: what it will be, where it goes, and how it is built or reused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, artifact_path, commit, find, fingerprint, open_or_fail, partial_folder, peek

log = logging.getLogger(__name__)
MODEL = "model"
"""The folder of a trained model inside its artifact."""


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
        """The finished artifact, if it is there."""
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


def build(planned: Place, work: Callable[[Path], Mapping[str, Any]], replace: bool = False) -> Artifact:
    """Reuse the planned artifact, or do the work in a folder beside its place and commit it.

    Args:
        planned: the artifact.
        work: fills the folder it is given and returns counts; called again after a failure, it finds what it left there.
        replace: the place is fixed (not content-addressed), so an artifact with another fingerprint there is outdated.
    """
    if not (replace and _outdated(planned)):
        existing = planned.existing()
        if existing is not None:
            log.info("%s: reused (%s)", planned.label, planned.fingerprint)
            return existing
    with partial_folder(planned.path) as folder:
        if not replace and (existing := planned.existing()) is not None:
            return existing  # another process finished it while this one waited for the lock
        started = time.monotonic()
        counts = work(folder)
        return commit(
            folder, planned.path, stage=planned.stage, fingerprint=planned.fingerprint, recipe=planned.recipe,
            upstream=planned.upstream, counts=counts, seconds=time.monotonic() - started,
        )  # fmt: skip


def _outdated(planned: Place) -> bool:
    manifest = peek(planned.path)
    return planned.path.exists() and (manifest is None or manifest.fingerprint != planned.fingerprint)
