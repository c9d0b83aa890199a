"""The hub: names become commits, so that fingerprints name content, and files are asked for again and checked before use.

What the client library does by itself is left to it: it repeats a look-up of one file and goes on with a body that was cut.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.artifacts import file_digest, write_text_atomically
from pipeline.errors import ArtifactError, DataError, ModelError, PipelineError

log = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 5
"""How often the hub is asked: with 1, 2, 4 and 8 s between, or as long as it says."""
_LONGEST_WAIT = 300.0
_AGAIN = {408, 429, 500, 502, 503, 504}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKED = "checked.json"


class HubUnavailable(PipelineError):
    """The hub cannot be reached, fails, or serves something else than it announces; nothing that a setting here would mend."""

    exit_code = 1


@dataclass(frozen=True)
class Request:
    """What is asked of the hub, for messages.

    Attributes:
        what: dotted path of the setting.
        verb: "resolve" or "fetch".
        repo: owner/name.
        revision: commit, tag or branch.
        repo_type: "model" or "dataset".
        file: path in the repository, None for all of them.
    """

    what: str
    verb: str
    repo: str
    revision: str
    repo_type: str
    file: str | None = None

    def __str__(self) -> str:
        file = f"{self.file} of " if self.file else ""
        return f"{self.what}: cannot {self.verb} {file}{self.repo}@{self.revision}"

    def refused(self, reason: str, advice: str) -> PipelineError:
        """The error of something that would be refused again."""
        kind: type[PipelineError] = ModelError if self.repo_type == "model" else DataError
        return kind(f"{self} ({reason}); {advice}, or use a local copy: --set {self.what}='{{kind: local, path: PATH}}'")


def resolve_revision(repo: str, revision: str, repo_type: str, what: str) -> str:
    """The commit that a revision names: itself if it is one, else by asking the hub, else as this machine last saw it.

    Args:
        repo: owner/name.
        revision: commit, tag or branch.
        repo_type: "model" or "dataset".
        what: dotted path of the setting, for messages.

    Raises:
        ModelError, DataError: neither the hub nor the local hub cache knows it.
        HubUnavailable: the hub does not answer, and the cache does not know it.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    request = Request(what, "resolve", repo, revision, repo_type)
    cached = _cached_commit(repo, revision, repo_type)
    try:
        info = _patiently(
            lambda: HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=20),
            request, attempts=1 if cached else ATTEMPTS,
        )  # fmt: skip
    except PipelineError as error:
        if cached is None:
            raise
        _tell_once(f"{error}\n{repo}@{revision}: going on with commit {cached}, as this machine last saw it")
        return cached
    if info.sha:
        return str(info.sha)
    raise request.refused("the hub names no commit", "name a commit")


def fetch_file(repo: str, file: str, revision: str, what: str) -> Path:
    """A file of a dataset repository in the hub cache, downloaded if it is not there, and checked.

    Args:
        repo: owner/name.
        file: path in the repository.
        revision: commit, tag or branch.
        what: dotted path of the setting, for messages.

    Raises:
        DataError: there is no such file, or it may not be read.
        HubUnavailable: the hub does not answer, or serves something else than it announces.
    """
    import huggingface_hub as hub

    request = Request(what, "fetch", repo, revision, "dataset", file)

    def download(again: bool) -> Path:
        return Path(hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision, force_download=again))

    path = in_cache(_patiently(lambda: download(again=False), request), what)
    for _ in _damaged([path]):
        path = in_cache(_patiently(lambda: download(again=True), request), what)
        _require_whole([path], request)
    return path


def fetch_folder(repo: str, revision: str, patterns: Sequence[str], what: str) -> Path:
    """The files of a model repository in the hub cache, downloaded as far as they are not there, and checked.

    Args:
        repo: owner/name.
        revision: commit, tag or branch.
        patterns: of the files.
        what: dotted path of the setting, for messages.

    Raises:
        ModelError: there is no such model, or it may not be read.
        HubUnavailable: the hub does not answer, or serves something else than it announces.
    """
    import huggingface_hub as hub

    request = Request(what, "fetch", repo, revision, "model")
    folder = Path(_patiently(lambda: hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)), request))
    files = [file for file in in_cache(folder, what).rglob("*") if file.is_file()]
    damaged = _damaged(files)
    for path in damaged:
        name = path.relative_to(folder).as_posix()
        _patiently(lambda name=name: hub.hf_hub_download(repo, name, revision=revision, force_download=True), request)  # type: ignore[misc]
    if damaged:
        _require_whole(in_cache(folder, what).rglob("*"), request)
    return folder


def _patiently(call: Callable[[], T], request: Request, attempts: int = ATTEMPTS) -> T:
    """Call the hub until it answers, with longer and longer breaks, a bit of them random.

    Raises:
        ModelError, DataError: it refuses.
        HubUnavailable: it did not answer a single time.
    """
    started = time.monotonic()
    for attempt in range(1, attempts + 1):
        try:
            return call()
        # The client's errors are those of its HTTP library, which differs between its versions: whatever it is, it is told.
        except Exception as error:
            if not _is_outage(error):
                raise _refusal(error, request) from None
            reason, wait = _reason(error), _break(error, attempt)
        if attempt < attempts:
            log.info("%s (%s); asking again in %.0f s", request, reason, wait)
            time.sleep(wait)
    asked = f"asked {attempts} times in {time.monotonic() - started:.0f} s" if attempts > 1 else "asked once"
    raise HubUnavailable(
        f"{request}: the hub at {_host()} does not answer ({reason}; {asked}); run again later, name a mirror in HF_ENDPOINT, "
        f"set HF_HUB_OFFLINE=1 if this machine's hub cache has it, or use a local copy: --set {request.what}='{{kind: local, "
        "path: PATH}'"
    )


def _is_outage(error: Exception) -> bool:
    """Whether asking again can help."""
    status = _status(error)
    if status is not None:
        return status in _AGAIN
    names = _kinds(_failed_request(error))
    if names & {"OfflineModeIsEnabled", "UnsupportedProtocol"}:
        return False
    return "TransportError" in names or str(error).startswith("Consistency check failed")


def _refusal(error: Exception, request: Request) -> PipelineError:
    names, status = _kinds(_failed_request(error)), _status(error)
    page = f"https://{_host()}/{'' if request.repo_type == 'model' else 'datasets/'}{request.repo}"
    if "OfflineModeIsEnabled" in names:
        return request.refused("HF_HUB_OFFLINE is set, and this machine has no copy of it", "unset it")
    if "GatedRepoError" in names:
        return request.refused("its access is restricted", f"accept its licence at {page} and set HF_TOKEN")
    if "RepositoryNotFoundError" in names:
        return request.refused("there is no such repository, or it is private", "check the spelling, or set HF_TOKEN for it")
    if "RevisionNotFoundError" in names:
        return request.refused("the repository has no such revision", f"choose one of {page}/tree/main")
    if status in (401, 403):
        return request.refused(f"HTTP status {status}", f"set HF_TOKEN to a token that may read {page}")
    if status == 404:
        return request.refused("there is no such file", f"choose one of {page}/tree/{request.revision}")
    return request.refused(_reason(error), "check the names and the network")


def _break(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: what the hub asks for, else twice as long each time; up to a quarter more by chance."""
    response = _response(error)
    asked = str(response.headers.get("retry-after", "")) if response is not None else ""
    seconds = float(asked) if asked.isdecimal() else 2.0 ** (attempt - 1)
    return min(_LONGEST_WAIT, seconds) * random.uniform(1.0, 1.25)  # noqa: S311  # nosec B311


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _failed_request(error: BaseException) -> BaseException:
    """What is behind an error that only says that nothing was found; the library below the client is httpx or httpx2."""
    known = {"HTTPError", "OfflineModeIsEnabled"}
    return next(
        (each for each in _causes(error) if _kinds(each) & known and "LocalEntryNotFoundError" not in _kinds(each)), error
    )


def _response(error: Exception) -> Any:
    found = (getattr(each, "response", None) for each in _causes(error))
    return next((response for response in found if response is not None), None)


def _status(error: Exception) -> int | None:
    response = _response(error)
    return None if response is None else int(response.status_code)


def _reason(error: Exception) -> str:
    status = _status(error)
    cause = _failed_request(error)
    return f"HTTP status {status}" if status else (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _host() -> str:
    from huggingface_hub.constants import ENDPOINT

    return urlsplit(ENDPOINT).netloc.rpartition("@")[2] or str(ENDPOINT)


@functools.cache
def _tell_once(message: str) -> None:
    log.warning("%s", message)


def _require_whole(files: Iterable[Path], request: Request) -> None:
    for path in _damaged(file for file in files if file.is_file()):
        blob = _blob(path)
        with contextlib.suppress(OSError):  # of a cache that may not be written
            path.unlink()
            if blob is not None:
                blob.unlink()
        raise HubUnavailable(
            f"{request}: what the hub at {_host()} serves of {path.name} is not what it announces (its checksum differs); run "
            f"again later, or use a local copy: --set {request.what}='{{kind: local, path: PATH}}'"
        )


def _damaged(files: Iterable[Path]) -> list[Path]:
    """Files of the hub cache whose content is not that by which the cache names them.

    A content is read once: its size and time of change are kept beside it, and it is read again when they have changed.
    """
    found: list[Path] = []
    for path in files:
        blob = _blob(path)
        if blob is None:
            continue
        ledger = blob.parent.with_name(_CHECKED)
        checked, state = _read_ledger(ledger), _state(blob)
        if checked.get(blob.name) == state:
            continue
        if _is_whole(blob):
            # A cache that may not be written is read each time.
            with contextlib.suppress(OSError):
                write_text_atomically(ledger, json.dumps({**checked, blob.name: state}))
        else:
            log.warning("%s: damaged in the hub cache", path)
            found.append(path)
    return found


def _blob(path: Path) -> Path | None:
    """The content that a file of the cache is a link to, named by its hash; None where links are not used."""
    if not path.is_symlink():
        return None
    blob = path.parent / os.readlink(path)
    return blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else None


def _state(blob: Path) -> list[int]:
    found = blob.stat()
    return [found.st_size, found.st_mtime_ns]


def _is_whole(blob: Path) -> bool:
    """The name is SHA-256 for large files and git's hash for others; mirrors are known that use plain SHA-1."""
    if len(blob.name) == 64:
        return file_digest(blob) == blob.name
    plain = hashlib.sha1(usedforsecurity=False)
    git = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    with blob.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            plain.update(chunk)
            git.update(chunk)
    return blob.name in (git.hexdigest(), plain.hexdigest())


def _read_ledger(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def in_cache(path: Path, what: str) -> Path:
    """A downloaded file or folder of the hub cache, whose files are links into the cache; none may lead out of it.

    Raises:
        ArtifactError: one does.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = os.path.realpath(HF_HUB_CACHE)
    for file in (path, *(path.rglob("*") if path.is_dir() else ())):
        if not Path(os.path.realpath(file)).is_relative_to(cache):
            raise ArtifactError(
                f"{what}: {file} leads out of the hub cache {HF_HUB_CACHE} by a symbolic link; remove it and run again to "
                "fetch it anew"
            )
    return path


def _cached_commit(repo: str, revision: str, repo_type: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    references = Path(HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}" / "refs"
    reference = references / revision
    # A branch can have slashes in its name, but nothing that leads out of the folder is one.
    if not reference.resolve().is_relative_to(references.resolve()) or not reference.is_file():
        return None
    commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    return commit if _COMMIT.fullmatch(commit) else None
