"""A folder at an fsspec URL: the few operations that a shared artifact store needs, and what each of them promises."""

from __future__ import annotations

import os
import re
import secrets
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.artifacts import sync
from pipeline.errors import ArtifactError, ConfigError

SETTLE_SECONDS = 5.0
"""File systems that cannot create a file only where there is none: the last writer within this time wins."""
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""They have no folders to make, replace an object at once, and can refuse to create one that exists (a conditional write)."""


@dataclass(frozen=True)
class RemoteFolder:
    """Files under one URL; names are relative, with `/`.

    A read sees a written file whole or not at all on local file systems, object stores and memory.

    Attributes:
        fs: the fsspec file system.
        root: the folder's path in it.
        shown: the URL for people, without user name, password and query.
        exclusive: whether the file system itself refuses to create a file that exists.
    """

    fs: Any = field(repr=False)
    root: str = field(repr=False)
    shown: str
    exclusive: bool = False

    def read(self, name: str) -> bytes | None:
        """Content of a small file, None if there is none."""
        try:
            content: bytes = self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file."""
        path = self._prepared(name)
        if not isinstance(self.fs, LocalFileSystem):
            self.fs.pipe_file(path, content)
            return
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        self.fs.pipe_file(temporary, content)
        sync(Path(temporary))
        os.replace(temporary, path)
        sync(Path(path).parent)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file where there is none; False if it exists. `content` must be unlike anyone else's.

        Of several callers one gets True. Where the file system cannot promise that (`exclusive` is false), each writes,
        waits SETTLE_SECONDS and looks whose content stayed, which holds as long as no writer is slower than that.
        """
        path = self._prepared(name)
        if not self.exclusive:
            if self.read(name) is not None:
                return False
            self.write(name, content)
            time.sleep(SETTLE_SECONDS)
            return self.read(name) == content
        try:
            _create(self.fs, path, content)
        except OSError:
            # Also of a request that was sent again because the first one's answer was lost: the content says whose it is.
            found = self.read(name)
            if found is None:
                raise
            return found == content
        return True

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, without the folder; empty if there is none."""
        try:
            paths = self.fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.fs.rm_file(self._path(name))
        except FileNotFoundError:
            pass

    def download(self, name: str, target: Path) -> None:
        """Copy a file to this machine.

        Raises:
            FileNotFoundError: it is not there.
        """
        self.fs.get_file(self._path(name), str(target))

    def upload(self, source: Path, name: str) -> None:
        """Copy a file from this machine."""
        path = self._prepared(name)
        self.fs.put_file(str(source), path)
        if isinstance(self.fs, LocalFileSystem):
            sync(Path(path))  # before a manifest names it

    def _path(self, name: str) -> str:
        """Where a name is; the store itself may be a symbolic link, but what others put into it may not lead out of it."""
        path = f"{self.root}/{name}"
        local = isinstance(self.fs, LocalFileSystem)
        if local and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            raise ArtifactError(f"store {self.shown}: {name} leads out of the store by a symbolic link; remove the link there")
        return path

    def _prepared(self, name: str) -> str:
        path = self._path(name)
        if not _protocols(self.fs) & _OBJECT_STORES:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path


def open_remote(url: str) -> RemoteFolder:
    """The folder at a URL or path; it can be written, which is tried once per process.

    Raises:
        ConfigError: nobody knows the protocol, its package is not installed, or the folder cannot be read and written.
    """
    folder = _open(url)
    return RemoteFolder(folder.fs, folder.root, folder.shown, _creates_exclusively(url))


def without_secrets(text: str) -> str:
    """A URL, or a message with URLs, without user names, passwords and queries."""
    return re.sub(r"(://)[^/\s]*@|\?\S*", r"\1", text)


def reason(error: Exception) -> str:
    """The first line of an error, without secrets."""
    return without_secrets((str(error).strip().splitlines() or [""])[0] or type(error).__name__)


def _open(url: str) -> RemoteFolder:
    shown = without_secrets(url)
    try:
        # Listings that other machines change must not come from this process's memory.
        fs, root = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"store {shown}: cannot be opened ({reason(error)}); use a path, file://…, s3://BUCKET/… (pip install s3fs) "
            "or gs://BUCKET/… (pip install gcsfs)"
        ) from None
    return RemoteFolder(fs, str(root).rstrip("/"), shown)


@lru_cache(maxsize=8)
def _creates_exclusively(url: str) -> bool:
    """Write, read and remove a file; tells whether creating it a second time was refused.

    Asked of the store and not only of its kind: some servers that speak S3 ignore the condition of a conditional write.
    """
    folder = _open(url)
    fs, name, content = folder.fs, f".probe-{secrets.token_hex(8)}", secrets.token_bytes(8)
    knows = bool(_protocols(fs) & (_OBJECT_STORES | {"file", "local", "memory"}))
    # Clients raise errors of their own libraries, from a missing bucket to missing credentials: the user is told all of them.
    try:
        folder.write(name, content)
        refused = knows and not RemoteFolder(fs, folder.root, folder.shown, exclusive=True).create(name, content[::-1] + b"x")
        if not refused:
            folder.write(name, content)
        readable = folder.read(name) == content
        folder.remove(name)
    except Exception as error:
        raise ConfigError(
            f"store {folder.shown}: cannot be read and written ({reason(error)}); check the address, the permissions and the "
            "credentials in the environment"
        ) from error
    if not readable:
        raise ConfigError(f"store {folder.shown}: does not give back what was written to it; use another one")
    return refused


def _create(fs: Any, path: str, content: bytes) -> None:
    if isinstance(fs, LocalFileSystem):  # its pipe_file looks first and writes then
        with fs.open(path, "xb") as stream:
            stream.write(content)
    else:
        fs.pipe_file(path, content, mode="create")


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
