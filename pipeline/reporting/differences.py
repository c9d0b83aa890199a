"""Every setting in which two methods of a comparison differ (hazard 9)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same for all methods.

    Attributes:
        setting: dotted path.
        values: method → its value as text, ABSENT for a method that has no such setting.
    """

    setting: str
    values: Mapping[str, str]


def differences(settings: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Compare the settings of methods.

    Args:
        settings: method → dotted path → value.

    Returns:
        The settings that differ, in the order in which they appear; none for a single method.
    """
    names = list(dict.fromkeys(name for own in settings.values() for name in own))
    rows = (Difference(name, {method: _text(own, name) for method, own in settings.items()}) for name in names)
    return [row for row in rows if len(set(row.values.values())) > 1]


def write_csv(path: Path, rows: Sequence[Difference], methods: Sequence[str]) -> None:
    """differences.csv: a column for the setting and one for each method."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["setting", *methods])
        for row in rows:
            writer.writerow([row.setting, *(row.values[method] for method in methods)])


def _text(own: Mapping[str, Any], name: str) -> str:
    if name not in own:
        return ABSENT
    value = own[name]
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
