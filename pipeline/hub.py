"""The hub: names become commits, so that fingerprints name content and not whatever a branch points to today."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import DataError, ModelError, PipelineError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_revision(repo: str, revision: str, repo_type: str, what: str) -> str:
    """The commit that a revision names: itself if it is one, else by asking the hub, else as this machine last saw it.

    Args:
        repo: owner/name.
        revision: commit, tag or branch.
        repo_type: "model" or "dataset".
        what: dotted path of the setting, for messages.

    Raises:
        ModelError, DataError: neither the hub nor the local hub cache knows it.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        sha = HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=20).sha
        if sha:
            return str(sha)
        reason = "the hub names no commit"
    # The client raises errors of its HTTP library, which differs between its versions: whatever it is, the user is told.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    cached = _cached_commit(repo, revision, repo_type)
    if cached:
        return cached
    kind: type[PipelineError] = ModelError if repo_type == "model" else DataError
    raise kind(
        f"{what}: cannot resolve {repo}@{revision} ({reason}), and this machine has no copy; check the name and the network, "
        f"or use a local copy: --set {what}.path=PATH"
    )


def _cached_commit(repo: str, revision: str, repo_type: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    references = Path(HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}" / "refs"
    reference = references / revision
    # A branch can have slashes in its name, but nothing that leads out of the folder is one.
    if not reference.resolve().is_relative_to(references.resolve()) or not reference.is_file():
        return None
    commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    return commit if _COMMIT.fullmatch(commit) else None
