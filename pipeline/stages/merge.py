"""Stage: the comparisons of several experiments in one, from their records alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import Artifact, peek
from pipeline.config.base import ExperimentName
from pipeline.errors import ConfigError
from pipeline.reporting.merge import merge
from pipeline.reporting.record import Records
from pipeline.reporting.record_files import write_records
from pipeline.reporting.report import write_report
from pipeline.stages.place import build, place
from pipeline.stages.report import here

VERSION = 1
STAGE = "merge"
_NAMES: TypeAdapter[str] = TypeAdapter(ExperimentName)
_NAME_LETTERS = 64


def run(sources: Sequence[Records], out: Path, name: str, baseline: str | None = None, mix_protocols: bool = False) -> Artifact:
    """Write the report of several experiments, with its records, as one folder.

    Args:
        sources: their records, at least one.
        out: where it goes; a merged comparison that is there is replaced.
        name: title of the report.
        baseline: see `pipeline.reporting.merge.merge`.
        mix_protocols: see there.

    Raises:
        ConfigError: something else is at `out`, or it cannot be written; further as `merge`.
        ArtifactError: see `merge`; also a disk that is full.
    """
    _check_free(out)
    merged = merge(sources, baseline, mix_protocols)
    _check_writable(out)
    facts = merged.facts
    order = [own.label for own in facts.experiments]
    recipe = {"name": name, "baseline": facts.baseline, "mix_protocols": mix_protocols, "order": order}
    upstream = {own.label: own.fingerprint for own in facts.experiments}
    where = place(out.parent, STAGE, VERSION, f"merge {name}", recipe, upstream, out)

    def work(folder: Path) -> Mapping[str, Any]:
        for stale in folder.iterdir():  # of an attempt that failed, perhaps with other sources
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        write_records(folder, merged)
        write_report(folder, merged, name, where.fingerprint, here())
        return {"trials": len(facts.trials), "experiments": len(facts.experiments)}

    return build(where, work, replace=True)


def default_name(sources: Sequence[Records]) -> str:
    """`compare-A-B`, or of many experiments `compare-A-and-5-more`."""
    names = list(dict.fromkeys(own.name for source in sources for own in source.facts.experiments))
    whole = "-".join(["compare", *names])
    return whole if len(whole) <= _NAME_LETTERS else f"compare-{names[0][:32]}-and-{len(names) - 1}-more"


def check_name(name: str) -> str:
    """The name, if it can be that of a folder in the run directory.

    Raises:
        ConfigError: it cannot.
    """
    try:
        return str(_NAMES.validate_python(name))
    except ValidationError:
        raise ConfigError(f"--name: {name!r}; give letters, digits and ._- only, at most {_NAME_LETTERS}") from None


def _check_free(out: Path) -> None:
    manifest = peek(out)
    if manifest is not None and manifest.stage == STAGE:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already and no merged comparison; choose another, or remove it")


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written ({error.strerror}); choose another folder") from None
    if not any(out.iterdir()):
        out.rmdir()
