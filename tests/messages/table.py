"""The table of all messages, table.yaml, as objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Message:
    """One message; see the head of table.yaml."""

    where: str
    text: str
    by: str
    names: str
    fix: str = ""
    value: str = ""
    allowed: str = ""
    heard: bool = True

    @property
    def parts(self) -> list[str]:
        """What has to be in the message."""
        return [part for part in (self.names, self.value, self.allowed, self.fix) if part]


TABLE: dict[str, list[Message]] = {
    file: [Message(**row) for row in rows]
    for file, rows in yaml.safe_load(Path(__file__).with_name("table.yaml").read_text(encoding="utf-8")).items()
}
