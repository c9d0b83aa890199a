"""Spoilt data files: rows, or one message with the file and the place in it."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import experiment
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from fuzzing import byte_changes, change_bytes, examples, listing, refusal, run, values, watched
from hypothesis import event, given
from hypothesis import strategies as st
from rows import read_examples

from pipeline.data.sources import LocalSource, source_digest
from pipeline.errors import DataError

pytestmark = pytest.mark.timeout(3000)
ROWS = [*tiny.rows(6), {"instruction": "Übersetze 😀", "input": "‮עברית", "output": "line\nbreak"}, *tiny.rows(2)]
COLUMNS = ["instruction", "input", "context", "output", "response", "category", "id", "", "Instruction", "\x1b[2J", "é" * 500]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8", "replace")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["none"]
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    try:
        pq.write_table(pa.table(columns), stream)
    except pa.ArrowNotImplementedError:  # structs without fields
        return as_parquet([{name: ascii(value) for name, value in row.items()} for row in rows])
    return stream.getvalue()


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return pa.array([ascii(value) for value in values])


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()


FORMATS = {
    ".jsonl": as_jsonl,
    ".json": lambda rows: json.dumps(rows, default=str).encode(),
    ".csv": as_csv,
    ".parquet": as_parquet,
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole experiment."""
    folder = tmp_path_factory.mktemp("data")
    experiment.write(folder)
    return folder


@pytest.fixture(autouse=True)
def _here(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows with other columns and values."""
    found = [dict(row) for row in ROWS[: draw(st.integers(0, len(ROWS)))]]
    for row in found:
        if draw(st.integers(0, 3)) == 0:
            row[draw(st.sampled_from(COLUMNS))] = draw(values())
        if draw(st.integers(0, 5)) == 0:
            row.pop(draw(st.sampled_from(sorted(row))))
    return found * draw(st.integers(1, 2))


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Suffix and content of a data file that is spoilt in its rows, its bytes, or both."""
    suffix = draw(st.sampled_from(sorted(FORMATS)))
    content = FORMATS[suffix](draw(rows()) if draw(st.booleans()) else ROWS)
    content = change_bytes(content, draw(st.lists(byte_changes(), max_size=3)))
    return draw(st.sampled_from([suffix] * 5 + sorted(FORMATS))), content


@given(file=files())
@examples(2000)
def test_a_spoilt_file_gives_rows_or_one_message(room: Path, file: tuple[str, bytes]) -> None:
    suffix, content = file
    path = room / f"spoilt{suffix}"
    path.write_bytes(content)
    before = listing(room)
    with watched() as touched:
        digest = source_digest(LocalSource(path))
        try:
            found = read_examples(LocalSource(path))
        except DataError as error:
            event(f"{suffix} refused")
            message = str(error)
            assert message.startswith(str(path)) and "\n" not in message and len(message) < 2000
            assert message.isprintable(), ascii(message)
        else:
            event(f"{suffix} read")
            assert found and len({row.id for row in found}) == len(found)
            for row in found:
                assert row.instruction.strip() and row.references
                "".join((row.instruction, row.input, *row.references)).encode()
    assert source_digest(LocalSource(path)) == digest
    assert listing(room) == before and not touched


@given(file=files())
@examples(500)
def test_validate_refuses_a_spoilt_file_with_its_name(room: Path, file: tuple[str, bytes]) -> None:
    suffix, content = file
    path = room / f"spoilt{suffix}"
    path.write_bytes(content)
    before = listing(room)
    outcome = run("validate", "experiment.yaml", "--set", f"data.train.path={path.name}", "--set", "train.batch_size=1")
    assert listing(room) == before and not outcome.touched
    event(f"{suffix} exit code {outcome.code}")
    message = refusal(outcome)
    assert not message or path.name in message
