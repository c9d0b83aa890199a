"""What all config models share: frozen, and an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _not_taken(name: str) -> str:
    if name in ("artifacts", "mlartifacts") or name.startswith("mlflow.db"):
        raise ValueError("the run directory has something else of that name; choose another")
    return name


ExperimentName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), AfterValidator(_not_taken)]
"""Folder under the run directory and MLflow experiment."""


def _readable(path: Path) -> Path:
    if not str(path).isprintable():
        raise ValueError("a path with characters that cannot be shown; rename it")
    return path


LocalPath = Annotated[Path, AfterValidator(_readable)]
"""A path on this machine, wherever the user keeps it."""
Name = Annotated[str, Field(pattern=r"^\w[\w .+-]{0,63}$")]
"""A name in tables, figures and MLflow: no separator of paths, no markup."""
Repo = Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*(/[\w-]+(\.[\w-]+)*)?$")]
"""owner/name on the hub, or a name without owner; never `..`."""
Revision = Annotated[str, Field(pattern=r"^[\w+-]+(\.[\w+-]+)*(/[\w+-]+(\.[\w+-]+)*)*$")]
"""Commit hash, tag or branch; never `..`, which would leave the folder of references."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
