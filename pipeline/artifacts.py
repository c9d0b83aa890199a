"""Content-addressed artifacts: a folder with a manifest, written beside its final place and renamed into it.

The fingerprint is known before anything runs: a hash of the stage's name and code version, its recipe (the settings
and the digests of external inputs) and its upstream fingerprints. Same fingerprint and complete → reused.

Durability: a name is given only to what is on disk already. A file is synced before anything names it (a manifest, a
ledger, a checkpoint, a rename), a folder's entries before the folder is renamed, the parent folder after the rename and
before what the rename replaces is removed. A power failure that loses a rename therefore leaves the old name with all of
its content, from which the next run goes on; none ever shows a new name with less. On a file system that breaks this
promise, sizes and checksums tell. Locks and leases are not synced: after a power failure none of their holders lives.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import ArtifactError, PipelineError
from pipeline.locks import exclusive

MANIFEST = "manifest.json"
PARTIAL_SUFFIX = ".partial"
UNSEALED = "0" * 64
"""Stands where `seal` will put the digest."""
_SEAL = re.compile(rb"sealed_by[^0-9a-f]{1,8}([0-9a-f]{64})")
# What a disk that is full, over its quota or read-only answers; EFBIG is a limit on a file's size.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "numpy")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and how it came to be.

    Attributes:
        stage: name of the stage that made it.
        fingerprint: 16 hex digits, see `fingerprint`.
        recipe: the settings and input digests that the fingerprint covers.
        upstream: name → fingerprint of the artifacts it was made from.
        counts: rows, tokens, bytes, … whatever the stage counts.
        files: relative path → {"bytes": int, "sha256": hex}, every file but the manifest.
        versions: python and package versions at creation.
        created: seconds since the epoch.
        seconds: wall time of the work (summed over resumptions where the stage knows it).
        complete: always true in a committed artifact.
        sealed_by: see `seal`; of manifests that an earlier version wrote, `UNSEALED`.
    """

    stage: str
    fingerprint: str
    recipe: dict[str, Any]
    upstream: dict[str, str]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    created: float
    seconds: float = 0.0
    complete: bool = True
    sealed_by: str = UNSEALED


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: where it is and what its manifest says."""

    path: Path
    manifest: Manifest = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The manifest's fingerprint."""
        return self.manifest.fingerprint


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; the same value always gives the same text.

    Raises:
        ValueError: NaN or infinity, which have no JSON form.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(stage: str, version: int, recipe: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """16 hex digits that identify an artifact by everything that determines its content.

    Args:
        stage: the stage's name.
        version: the stage's code version; raise it when the same recipe would give other content.
        recipe: JSON-able settings and digests of external inputs.
        upstream: name → fingerprint of the inputs.
    """
    text = canonical_json({"stage": stage, "version": version, "recipe": recipe, "upstream": dict(upstream)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def seal(content: bytes) -> bytes:
    """Put the digest of `content` into it, where it has a field "sealed_by" with the value `UNSEALED`.

    Every byte of what is returned is covered, the field's own name and the spaces around it too; see `is_sealed`.
    """
    start, end = _seal_span(content) or (0, 0)
    if content[start:end].decode() != UNSEALED:
        raise ValueError("no field sealed_by to put a digest into")
    return content[:start] + hashlib.sha256(content).hexdigest().encode() + content[end:]


def is_sealed(content: bytes) -> bool:
    """Whether this is, to the byte, what `seal` made."""
    span = _seal_span(content)
    if span is None:
        return False
    start, end = span
    blank = content[:start] + UNSEALED.encode() + content[end:]
    return hashlib.sha256(blank).hexdigest().encode() == content[start:end]


def _seal_span(content: bytes) -> tuple[int, int] | None:
    spans = [found.span(1) for found in _SEAL.finditer(content)]
    return spans[-1] if spans else None  # the last one: what a model wrote may hold the word, too


def artifact_path(root: Path, stage: str, fingerprint: str) -> Path:
    """Where the artifact of a stage lives under an artifact root."""
    return root / stage / fingerprint


def parse_manifest(content: bytes) -> Manifest:
    """What a manifest says; no file that it names is outside the artifact's folder.

    Raises:
        ValueError, TypeError, AttributeError, RecursionError: it is no manifest.
    """
    manifest = Manifest(**json.loads(content))
    if not all(isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys() for facts in manifest.files.values()):
        raise ValueError("a file without size and checksum")
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        plain = bool(parts) and name == "/".join(parts) and "\\" not in name and "\0" not in name
        if not plain or ".." in parts or parts[0] == "/" or name == MANIFEST:
            raise ValueError(f"names a file {name!r}, which is not inside the artifact")
    return manifest


def find(path: Path, fingerprint: str) -> Artifact | None:
    """The artifact at `path` if it is complete and has this fingerprint; None if nothing is there.

    The folder itself, and those above it, may be symbolic links; nothing inside it may lead out of it.

    Raises:
        ArtifactError: something is there, but it is another artifact, or its manifest or a file is damaged, missing or a link
            to something outside.
    """
    if not path.exists():
        return None
    _refuse_links_out(path)
    manifest = _read_manifest(path)
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(
            f"{path}: holds fingerprint {manifest.fingerprint}, expected {fingerprint}; remove the folder to rebuild it"
        )
    for name, facts in manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != facts["bytes"]:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
            raise ArtifactError(
                f"{file}: expected {facts['bytes']} bytes, found {found}; remove {path} and run again to rebuild it"
            )
    return Artifact(path, manifest)


def peek(path: Path) -> Manifest | None:
    """The manifest of a finished artifact, None for anything else; for looking around, not for opening."""
    try:
        return _read_manifest(path)
    except ArtifactError:
        return None


def open_or_fail(path: Path, fingerprint: str | None = None) -> Artifact:
    """Open a committed artifact for use and verify every file's checksum.

    Raises:
        ArtifactError: nothing complete is there, it has another fingerprint, or a checksum differs.
    """
    artifact = find(path, fingerprint or _read_manifest(path).fingerprint)
    if artifact is None:
        raise ArtifactError(f"{path}: no such artifact; run the command that makes it")
    for name, facts in artifact.manifest.files.items():
        if file_digest(path / name) != facts["sha256"]:
            raise ArtifactError(f"{path / name}: checksum differs; remove {path} and run again to rebuild it")
    return artifact


@contextlib.contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """A working folder beside `final`, kept after a failure so that the stage can go on from it.

    One process at a time: another that holds it makes this wait (see `pipeline.locks`).

    Raises:
        ArtifactError: what is done with it, or making it, meets a disk that cannot be written.
    """
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    try:
        _make_durable_folder(final.parent)
        with exclusive(final.with_name(final.name + ".lock")):
            partial.mkdir(exist_ok=True)
            # Killed while it wrote a text file, a process leaves the part that it had; nobody else writes here now.
            for stray in partial.rglob(".*.tmp"):
                stray.unlink()
            yield partial
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise ArtifactError(
            f"{partial}: cannot write here ({reason}); what is finished is kept: make room or make the folder writable, then "
            "run the same command again to go on"
        ) from error


def commit(
    partial: Path,
    final: Path,
    *,
    stage: str,
    fingerprint: str,
    recipe: Mapping[str, Any],
    upstream: Mapping[str, str],
    counts: Mapping[str, Any],
    seconds: float,
) -> Artifact:
    """Write the manifest into `partial`, make everything durable and rename the folder to `final`.

    An artifact that is already at `final` (a comparison that is rebuilt) is replaced.
    """
    files = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(partial.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = Manifest(
        stage=stage,
        fingerprint=fingerprint,
        recipe=dict(recipe),
        upstream=dict(upstream),
        counts=dict(counts),
        files=files,
        versions=_versions(),
        created=time.time(),
        seconds=seconds,
    )
    sync_all(partial)
    text = seal(json.dumps(asdict(manifest), indent=1, sort_keys=True, default=str).encode()).decode()
    write_text_atomically(partial / MANIFEST, text)
    discarded = final.with_name(final.name + ".discarded")
    if final.exists():
        shutil.rmtree(discarded, ignore_errors=True)
        os.rename(final, discarded)
    os.rename(partial, final)
    sync(final.parent)
    if discarded.exists():
        shutil.rmtree(discarded)
    return Artifact(final, _read_manifest(final))


def sync_all(folder: Path) -> None:
    """Make a folder and everything in it durable, so that it can be renamed."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, and keep its names by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def _make_durable_folder(path: Path) -> None:
    if not path.is_dir():
        _make_durable_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _refuse_links_out(path: Path) -> None:
    """Also of files that no manifest names: libraries look for some by themselves."""
    root = os.path.realpath(path)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = os.path.join(folder, name)
            if os.path.islink(entry) and not Path(os.path.realpath(entry)).is_relative_to(root):
                raise ArtifactError(
                    f"{entry}: a symbolic link out of the artifact; put the file itself there, or remove {path} and run again "
                    "to rebuild it"
                )


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        content = file.read_bytes()
        manifest = parse_manifest(content)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no {MANIFEST}, so this is not a finished artifact; remove it to rebuild it") from None
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file}: not a manifest ({error}); remove {path} to rebuild it") from None
    if manifest.sealed_by != UNSEALED and not is_sealed(content):
        raise ArtifactError(f"{file}: checksum differs; remove {path} and run again to rebuild it")
    if manifest.complete is not True:
        raise ArtifactError(f"{path}: its manifest says that it is incomplete; remove it to rebuild it")
    return manifest


def _disk_reason(error: Exception) -> str | None:
    """What a disk said that cannot be written; None if the error is about something else."""
    if isinstance(error, PipelineError):
        return None  # it has its message
    number, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number is None:  # safetensors, tokenizers and Arrow carry the operating system's error as text
        found = re.search(r"\(os error (\d+)\)|code: (\d+), kind|\[errno (\d+)\]", str(error))
        number = int(next(filter(None, found.groups()))) if found else None
    if number not in _DISK_ERRORS:
        return None
    return f"{os.strerror(number)}: {file}" if file else os.strerror(number)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _RECORDED_PACKAGES}}
