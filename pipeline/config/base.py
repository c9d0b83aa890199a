"""What all config models share: frozen, and an unknown key is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

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


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1000)]
"""Random generators take no negative seed; every one of them is a run of its own."""
MAX_NUMBER = 10**9
"""Most of anything that a setting counts; seeds are free."""
MAX_LETTERS = 4096
MAX_ITEMS = 10_000
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tabs and line ends, and those that change the direction of writing around them."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def beyond_limits(value: Any, at: tuple[str, ...] = ()) -> Iterator[str]:
    """One line for every setting that is too large for any use, wherever it is in a model."""
    dotted = ".".join(at)
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping | list | tuple):
        if len(value) > MAX_ITEMS:
            yield f"{dotted}: {len(value)} entries, but there are at most {MAX_ITEMS}; leave some out"
            return
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from beyond_limits(key, (*at, "a name in it"))
            yield from beyond_limits(item, (*at, str(key)))
    elif isinstance(value, str | Path):
        text = str(value)
        if len(text) > MAX_LETTERS:
            yield f"{dotted}: {len(text)} characters, but a text has at most {MAX_LETTERS}; shorten it"
        if unseen := _UNSEEN.search(text):
            yield f"{dotted}: {unseen[0]!r} at character {unseen.start() + 1} cannot be shown; remove it"
    elif isinstance(value, int) and abs(value) > MAX_NUMBER and not any("seed" in name for name in at):
        yield f"{dotted}: {value} is beyond {MAX_NUMBER}, the most that a setting can be; lower it"
