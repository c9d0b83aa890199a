"""Where comparisons are read from: folders, and MLflow stores."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST, peek
from pipeline.errors import ArtifactError, ConfigError, DataError
from pipeline.remote import without_secrets
from pipeline.reporting.record import Records
from pipeline.reporting.record_files import FILES, MAX_FILE_BYTES, read_records
from pipeline.tracking import configure_mlflow, stage_experiment

MLFLOW = "mlflow:"
COMPARISON = "comparison"
"""Folder of a comparison in its experiment's, and among the files of its run in MLflow."""
_STAGE = "stage"
_MANIFEST_BYTES = 2**24


def open_source(text: str, run_dir: Path) -> Records:
    """The records of a comparison.

    Args:
        text: a comparison's folder, an experiment's folder, a run directory with one experiment, or mlflow:EXPERIMENT[@STORE],
            where STORE is a tracking URI or another run directory.
        run_dir: its store is asked where none is given and MLFLOW_TRACKING_URI is not set.

    Raises:
        ConfigError: there is no such folder or experiment, or there are several.
        ArtifactError: it is no comparison, has no records or is damaged.
        DataError: the store cannot be read.
    """
    if text.startswith(MLFLOW):
        return _from_mlflow(text, run_dir)
    return read_records(_folder(Path(text), run_dir))


def _folder(path: Path, run_dir: Path) -> Path:
    """The comparison's folder."""
    if not path.is_dir():
        there = run_dir / path
        hint = f"; did you mean {there}?" if (there / COMPARISON).is_dir() else ""
        raise ConfigError(f"compare: {path} is no folder; give a comparison's folder, or RUN_DIR/NAME{hint}")
    if (path / MANIFEST).exists():
        return path
    if (path / COMPARISON).is_dir():
        return path / COMPARISON
    found = [folder for folder in sorted(path.glob(f"*/{COMPARISON}")) if _is_experiment(folder)]
    if not found:
        raise ConfigError(f"compare: {path} has no finished comparison; run `distilllens reproduce` first")
    if len(found) > 1:
        named = ", ".join(str(folder.parent) for folder in found)
        raise ConfigError(f"compare: {path} has several experiments; give one of {named}")
    return found[0]


def _is_experiment(folder: Path) -> bool:
    """Whether an experiment made it: what was merged from several is none."""
    manifest = peek(folder)
    return manifest is not None and manifest.stage == "compare"


def _from_mlflow(text: str, run_dir: Path) -> Records:
    name, _, given = text.removeprefix(MLFLOW).partition("@")
    shown = without_secrets(text)
    if not name:
        raise ConfigError(f"compare: {shown} names no experiment; write mlflow:EXPERIMENT or mlflow:EXPERIMENT@STORE")
    own = configure_mlflow(run_dir)
    store = own if not given else given if "://" in given else f"sqlite:///{Path(given).resolve() / 'mlflow.db'}"
    _check_store(shown, store)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(store)
        with tempfile.TemporaryDirectory() as folder:
            _download(client, _last_run(client, name, shown), Path(folder), shown)
            return read_records(Path(folder), shown)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = _printable(without_secrets(str(error).strip().partition("\n")[0]))
        raise DataError(f"{shown}: the store cannot be read ({reason}); check its address, and that it runs") from None


def _printable(text: str) -> str:
    """What a store says, without what would drive a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _check_store(text: str, store: str) -> None:
    """A SQLite file that is not there would be made."""
    if store.startswith("sqlite:///"):
        file = Path(store.removeprefix("sqlite:///").partition("?")[0])
        if not file.is_file():
            raise ConfigError(f"compare: {text}: there is no store {file}; give mlflow:EXPERIMENT@STORE, or set --run-dir")


def _last_run(client: Any, name: str, text: str) -> str:
    """The run of an experiment's newest comparison, which lies in the experiment of its stages."""
    known = {own.name: own.experiment_id for own in client.search_experiments()}
    stages = known.get(stage_experiment(name))
    finished = "tags.stage = 'compare' and attributes.status = 'FINISHED'"
    runs = client.search_runs([stages], finished, 1, 1, ["attributes.end_time DESC"]) if stages is not None else []
    if not runs:
        others = [own for own in known if stage_experiment(own) in known]
        raise ConfigError(
            f"compare: {text}: no finished comparison of that name; there are {_printable(', '.join(sorted(others))) or 'none'}"
        )
    return str(runs[0].info.run_id)


def _download(client: Any, run: str, folder: Path, text: str) -> None:
    """Fetch the records and the manifest; nothing else is asked for, whatever the run has."""
    sizes = {own.path: own.file_size or 0 for part in (COMPARISON, _STAGE) for own in client.list_artifacts(run, part)}
    wanted = {f"{_STAGE}/{MANIFEST}": _MANIFEST_BYTES, **{f"{COMPARISON}/{name}": MAX_FILE_BYTES[name] for name in FILES}}
    missing = [path for path in wanted if path not in sizes]
    if missing:
        raise ArtifactError(
            f"{text}: its run {run} has no {missing[0]}, as of an older version; run `distilllens reproduce` again there"
        )
    for path, limit in wanted.items():
        if sizes[path] > limit:
            raise ArtifactError(f"{text}: {path} has {sizes[path]} bytes, at most {limit} are read")
        with tempfile.TemporaryDirectory(dir=folder) as fetched:  # where in it the file goes depends on the store
            Path(client.download_artifacts(run, path, fetched)).rename(folder / Path(path).name)
