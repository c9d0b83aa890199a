"""docs/licences.md: every package that the pinned set installs, and its licence, as their metadata say."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

_HEAD = """# Licences of dependencies

Made by `python -m pipeline.licences constraints.txt docs/licences.md` from the metadata of the installed packages of the
tested set (constraints.txt); packages of extras that are not installed are left out. This project: Apache-2.0.

| package | version | licence |
| --- | --- | --- |
"""
_UNKNOWN = "see the package"
_MAX_LETTERS = 60


def licence_of(package: metadata.PackageMetadata) -> str:
    """The SPDX expression of a package, else its classifiers, else the first line of its licence field."""
    if "License-Expression" in package:
        return str(package["License-Expression"])
    classifiers = [str(item) for item in package.get_all("Classifier") or [] if str(item).startswith("License ::")]
    names = [item.rpartition(" :: ")[2] for item in classifiers if item != "License :: OSI Approved"]
    if names:
        return ", ".join(dict.fromkeys(names))
    line = (str(package["License"] if "License" in package else "").strip().splitlines() or [""])[0]
    return line if 0 < len(line) <= _MAX_LETTERS else _UNKNOWN


def licence_table(constraints: str) -> str:
    """The document.

    Args:
        constraints: text of constraints.txt, one `name==version` a line.
    """
    names = re.findall(r"^([A-Za-z0-9._-]+)==", constraints, flags=re.MULTILINE)
    rows = []
    # torch is installed before the constraints apply.
    for name in sorted([*names, "torch"], key=str.lower):
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        rows.append(f"| {name} | {found['Version']} | {licence_of(found).replace('|', '/')} |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(licence_table(Path(sys.argv[1]).read_text(encoding="utf-8")), encoding="utf-8")
