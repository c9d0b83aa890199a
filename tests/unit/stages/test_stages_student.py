"""What the untrained student is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stages
import tiny


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"kind": "pruned", "keep_layers": 4}, "pruned to 4 of 6 layers"),
        ({"kind": "scratch", "layers": 4}, "new, 4 layers"),
        ({"kind": "pretrained", "model": {"kind": "local", "path": "small"}}, "small"),
    ],
)
def test_a_student_says_what_it_is(config: dict[str, Any], label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tiny.llama(layers=3), tmp_path / "small")
    assert stages.planned(tmp_path, student=config).student.label == label
