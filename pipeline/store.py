"""A shared artifact store: what one machine has computed, others download.

Layout: STAGE/FINGERPRINT/ holds an artifact's files as they are in a run directory. The manifest is written last, so a
reader finds a whole artifact or none; STAGE/FINGERPRINT.lease/ says who works on it, see `pipeline.lease`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import (
    MANIFEST,
    PARTIAL_SUFFIX,
    UNSEALED,
    Artifact,
    Manifest,
    file_digest,
    find,
    is_sealed,
    parse_manifest,
    sync,
    sync_all,
)
from pipeline.errors import ArtifactError, PipelineError
from pipeline.lease import LIFETIME_SECONDS, Lease, Wait, clear, hold
from pipeline.locks import exclusive, lock_path
from pipeline.progress import progress
from pipeline.remote import RemoteFolder, open_remote, reason, without_secrets

log = logging.getLogger(__name__)
VARIABLE = "DISTILLLENS_STORE"
_TRANSFERS = 8


@dataclass(frozen=True)
class Store:
    """A store at a path or fsspec URL; credentials come from the environment, as the file system's package wants them.

    Attributes:
        url: may hold a password, so it is not shown.
        lifetime: seconds after which a lease without renewal may be taken over.
    """

    url: str = field(repr=False)
    lifetime: float = LIFETIME_SECONDS

    def has(self, stage: str, fingerprint: str) -> bool:
        """Whether a whole artifact is there."""
        with self._reported("look for", stage, fingerprint) as (folder, where):
            return folder.read(f"{where}/{MANIFEST}") is not None

    def fetch(self, stage: str, fingerprint: str, target: Path) -> Artifact | None:
        """Download an artifact to `target`; None if the store does not have it.

        Every file is verified before the folder gets its name. An interrupted download goes on with the files it lacks.

        Raises:
            ArtifactError: it is damaged in the store, or the store cannot be reached.
        """
        with self._reported("fetch", stage, fingerprint) as (folder, where):
            text = folder.read(f"{where}/{MANIFEST}")
            if text is None:
                return None
            manifest = _parse(text, stage, fingerprint, f"{folder.shown}/{where}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(lock_path(target)):
                if (existing := find(target, fingerprint)) is not None:
                    return existing
                arriving = _arrival(target, text)
                _transfer(f"fetch {where}", manifest.files, lambda name: _download(folder, where, name, manifest, arriving))
                sync_all(arriving)
                os.rename(arriving, target)
                sync(target.parent)
                # What an interrupted computation left here is not needed any more.
                shutil.rmtree(target.with_name(target.name + PARTIAL_SUFFIX), ignore_errors=True)
            return Artifact(target, manifest)

    def publish(self, artifact: Artifact, lease: Lease) -> None:
        """Upload an artifact and remove its lease; nothing is uploaded if a whole one is there.

        Raises:
            LeaseLost: another process took the lease over; nothing that a reader could see was uploaded.
            ArtifactError: the store cannot be reached.
        """
        manifest = artifact.manifest
        with self._reported("publish", manifest.stage, manifest.fingerprint) as (folder, where):
            if folder.read(f"{where}/{MANIFEST}") is None:
                lease.check()
                _transfer(
                    f"publish {where}", manifest.files, lambda name: folder.upload(artifact.path / name, f"{where}/{name}")
                )
                lease.check()
                folder.write(f"{where}/{MANIFEST}", (artifact.path / MANIFEST).read_bytes())
            clear(folder, lease.where)

    @contextlib.contextmanager
    def lease(self, stage: str, fingerprint: str, wait: Wait = "end") -> Iterator[Lease | None]:
        """Be the only one on any machine to work on an artifact; see `pipeline.lease.hold`.

        Args:
            stage: the artifact's.
            fingerprint: the artifact's.
            wait: for whom holds it; None if that is over and another still does.
        """
        with contextlib.ExitStack() as stack:
            with self._reported("take the lease on", stage, fingerprint) as (folder, where):
                lease = stack.enter_context(hold(folder, f"{where}.lease", self.lifetime, wait))
            yield lease

    @contextlib.contextmanager
    def _reported(self, action: str, stage: str, fingerprint: str) -> Iterator[tuple[RemoteFolder, str]]:
        """The store's folder and the artifact's place in it; whatever goes wrong becomes one message."""
        where = f"{stage}/{fingerprint}"
        try:
            yield open_remote(self.url), where
        except PipelineError:
            raise
        # The clients of object stores raise errors of their own libraries, which differ from one to the next.
        except Exception as error:
            raise ArtifactError(
                f"store {without_secrets(self.url)}: cannot {action} {where} ({reason(error)}); what is finished is kept in "
                f"the run directory: run again when the store can be reached, or without it (unset {VARIABLE})"
            ) from error


def store_from_environment() -> Store | None:
    """The store that DISTILLLENS_STORE names, None if it is unset or empty."""
    url = os.environ.get(VARIABLE, "").strip()
    return Store(url) if url else None


def check_store() -> None:
    """Make sure that the store of the environment, if there is one, can be read and written.

    Raises:
        ConfigError: it cannot.
    """
    store = store_from_environment()
    if store is not None and not open_remote(store.url).exclusive:
        log.warning(
            "store %s: cannot refuse to create a file that exists, so a lease rests on waiting; two machines that start "
            "at the same moment over a slow connection may compute an artifact twice",
            without_secrets(store.url),
        )


def _parse(text: bytes, stage: str, fingerprint: str, url: str) -> Manifest:
    """The manifest in the store, as its seal has it, with no file name that leads out of the artifact's folder."""
    fix = f"remove {url}/ from the store and run again"
    try:
        manifest = parse_manifest(text)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{url}/{MANIFEST}: not a manifest ({error}); {fix}") from None
    if manifest.sealed_by != UNSEALED and not is_sealed(text):
        raise ArtifactError(f"{url}/{MANIFEST}: its checksum differs; {fix}")
    if (manifest.stage, manifest.fingerprint, manifest.complete) != (stage, fingerprint, True):
        raise ArtifactError(f"{url}: holds {manifest.stage} {manifest.fingerprint}, expected {stage} {fingerprint}; {fix}")
    return manifest


def _arrival(target: Path, manifest: bytes) -> Path:
    """The folder beside `target` that a download fills; emptied if what lies there belongs to another manifest."""
    arriving = target.with_name(target.name + ".fetching")
    held = arriving / MANIFEST
    if not held.is_file() or held.read_bytes() != manifest:
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir()
        held.write_bytes(manifest)
    return arriving


def _download(folder: RemoteFolder, where: str, name: str, manifest: Manifest, arriving: Path) -> None:
    target, facts = arriving / name, manifest.files[name]
    if _matches(target, facts):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    damaged = f"{folder.shown}/{where}/{name}: {{}}; remove {folder.shown}/{where}/ from the store and run again to rebuild it"
    try:
        folder.download(f"{where}/{name}", target)
    except FileNotFoundError:
        raise ArtifactError(damaged.format("the file is missing in the store")) from None
    if not _matches(target, facts):
        target.unlink()
        raise ArtifactError(damaged.format("size or checksum differs from the manifest's"))


def _matches(file: Path, facts: Mapping[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == facts["bytes"] and file_digest(file) == facts["sha256"]


def _transfer(what: str, files: Mapping[str, Mapping[str, Any]], one: Callable[[str], None]) -> None:
    """Copy files, several at a time."""
    mebibytes = [facts["bytes"] / 2**20 for facts in files.values()]
    with ThreadPoolExecutor(_TRANSFERS) as pool, progress(what, round(sum(mebibytes), 1), "MiB") as advance:
        for size, _ in zip(mebibytes, pool.map(one, files), strict=True):
            advance(size)
