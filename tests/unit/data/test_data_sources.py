"""Every format, layout and mistake that a data file can have."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import read_examples

from pipeline.data import sources
from pipeline.data.examples import Example
from pipeline.data.sources import (
    BundledSource,
    HubSource,
    LocalSource,
    Rows,
    bundled_names,
    count_contents,
    draw_parts,
    iterate_examples,
    source_digest,
)
from pipeline.errors import DataError

ROW = {"instruction": "Name a colour.", "input": "", "output": "Red."}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def jsonl(path: Path, *rows: Any) -> LocalSource:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return LocalSource(path)


def text(path: Path, content: str | bytes) -> LocalSource:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return LocalSource(path)


def fails(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(source)
    return str(caught.value)


def rows(count: int) -> list[dict[str, str]]:
    return [{**ROW, "instruction": f"Question {index}"} for index in range(count)]


# Layouts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "I", "prompt": "ignored", "input": "C", "output": ["a", "b"], "topic": "t"},
            ("I", "C", ("a", "b"), "t"),
        ),
        ({"instruction": "I", "context": "C", "response": "a", "category": "qa"}, ("I", "C", ("a",), "qa")),
        ({"instruction": "I", "input": "", "output": "a"}, ("I", "", ("a",), "")),
        ({"instruction": "I", "output": ""}, ("I", "", ("",), "")),
        ({"instruction": "I", "input": None, "output": "a", "category": None}, ("I", "", ("a",), "")),
        ({"instruction": " I\n", "input": "\t", "output": " a \n"}, (" I\n", "\t", (" a \n",), "")),
    ],
    ids=["minillm", "dolly", "alpaca", "no-input-empty-output", "nulls", "whitespace-kept"],
)
def test_layouts(tmp_path: Path, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    (example,) = read_examples(jsonl(tmp_path / "rows.jsonl", row))
    assert (example.instruction, example.input, example.references, example.category) == expected


def test_two_columns_for_the_same_thing(tmp_path: Path) -> None:
    same = jsonl(tmp_path / "same.jsonl", {**ROW, "response": "Red."})
    assert read_examples(same)[0].references == ("Red.",)
    assert fails(jsonl(tmp_path / "differ.jsonl", {**ROW, "response": "Blue."})) == (
        f"{tmp_path}/differ.jsonl:1: output and response differ, though both stand for the same; keep one of them"
    )


# Text


TEXTS = ["naïve café – “quotes”", "👩‍👩‍👧‍👦 family 🇿🇦", "مرحبا بالعالم", "line\u2028separator\u0085and\x0bmore", "a\r\nb\rc\nd"]


@pytest.mark.parametrize("content", TEXTS, ids=["latin", "emoji", "right-to-left", "unicode-line-ends", "line-ends"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_any_text_survives_every_format(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"rows{suffix}"
    row = {"instruction": content, "input": f'{content}, "again"', "output": content}
    if suffix == ".jsonl":
        jsonl(path, row)
    elif suffix == ".json":
        path.write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerow(row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (example,) = read_examples(LocalSource(path))
    assert (example.instruction, example.input, example.references) == (row["instruction"], row["input"], (content,))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_crlf_change_nothing(tmp_path: Path, suffix: str) -> None:
    content = {
        ".jsonl": json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "instruction": "Two"}) + "\n",
        ".json": json.dumps([ROW, {**ROW, "instruction": "Two"}], indent=1),
        ".csv": "instruction,input,output\nName a colour.,,Red.\n\nTwo,,Red.\n",
    }[suffix]
    plain = text(tmp_path / f"plain{suffix}", content)
    marked = text(tmp_path / f"marked{suffix}", b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert len(read_examples(plain)) == 2
    assert read_examples(marked) == read_examples(plain)


# Formats


def test_json_takes_a_list_or_an_object_with_data(tmp_path: Path) -> None:
    listed = text(tmp_path / "list.json", json.dumps(rows(2)))
    wrapped = text(tmp_path / "wrapped.JSON", json.dumps({"version": 1, "data": rows(2)}))
    assert read_examples(listed) == read_examples(wrapped)
    assert [example.instruction for example in read_examples(listed)] == ["Question 0", "Question 1"]


def test_csv_with_quoted_newlines_commas_and_quotes(tmp_path: Path) -> None:
    source = text(tmp_path / "rows.csv", 'instruction,context,response\n"two\nlines, ""quoted""",,"a,b"\nnext,c,d\n')
    first, second = read_examples(source)
    assert (first.instruction, first.input, first.references) == ('two\nlines, "quoted"', "", ("a,b",))
    assert (second.instruction, second.input, second.references) == ("next", "c", ("d",))


def test_csv_takes_fields_of_more_than_128_kib(tmp_path: Path) -> None:
    long = "word " * 40_000
    assert read_examples(text(tmp_path / "rows.csv", f"instruction,input,output\nI,{long},a\n"))[0].input == long


def test_parquet_with_lists_nulls_and_columns_of_no_concern(tmp_path: Path) -> None:
    table = pa.table(
        {"instruction": ["a", "b"], "input": ["x", None], "output": [["1", "2"], ["3"]], "embedding": [[0.1], [0.2]]},
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    found = read_examples(LocalSource(tmp_path / "rows.parquet"))
    assert [(row.instruction, row.input, row.references) for row in found] == [("a", "x", ("1", "2")), ("b", "", ("3",))]


# Slices and ids


def test_skip_and_first_take_a_slice_in_file_order(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", *rows(10))
    everything = read_examples(source)
    assert read_examples(replace(source, first=4)) == everything[:4]
    assert read_examples(replace(source, skip=4)) == everything[4:]
    assert read_examples(replace(source, skip=2, first=3)) == everything[2:5]
    assert read_examples(replace(source, skip=8, first=5)) == everything[8:]


def test_ids_come_from_the_content_and_duplicates_are_numbered_in_file_order(tmp_path: Path) -> None:
    a, b = rows(2)
    found = read_examples(jsonl(tmp_path / "rows.jsonl", a, b, {**a, "category": "other"}, a))
    first = found[0].id
    assert len(first) == 16 and int(first, 16) >= 0
    assert [row.id for row in found] == [first, found[1].id, f"{first}-2", f"{first}-3"]
    moved = read_examples(jsonl(tmp_path / "moved.jsonl", b, *rows(7)[2:], a))
    assert (moved[0].id, moved[-1].id) == (found[1].id, first)


@pytest.mark.parametrize(
    "change", [{"instruction": "Other"}, {"input": "x"}, {"output": "Blue."}, {"output": ["Red.", "Blue."]}]
)
def test_each_content_column_changes_the_id(tmp_path: Path, change: dict[str, Any]) -> None:
    one, other = read_examples(jsonl(tmp_path / "rows.jsonl", ROW, {**ROW, **change}))
    assert one.id != other.id and "-" not in other.id


def test_a_row_has_the_same_id_in_every_slice(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROW, ROW, ROW)
    ids = [row.id for row in read_examples(source)]
    assert [row.id for row in read_examples(replace(source, skip=1))] == ids[1:]
    assert len(set(ids)) == 3


def test_ids_are_pinned(tmp_path: Path) -> None:
    # Caches and splits are keyed by these: another value orphans every cache that exists.
    (example,) = read_examples(jsonl(tmp_path / "rows.jsonl", {"instruction": "é", "input": "", "output": "👍"}))
    assert example.id == "af2a6585da4dc7aa"


# Mistakes


BAD_LINES: dict[str, tuple[Any, str]] = {
    "not json": ('{"instruction": ', ":3: not valid JSON (Expecting value at column 17)"),
    "not an object": ("[1, 2]", ":3: expected an object with the columns {columns}, found list [1, 2]"),
    "no instruction": (
        {"input": "", "output": "a"},
        ":3: no instruction; it has input, output, allowed columns are {columns}",
    ),
    "null instruction": (
        {"instruction": None, "output": "a"},
        ":3: instruction is null; it has instruction, output, allowed columns are {columns}",
    ),
    "blank instruction": ({**ROW, "instruction": " \n"}, ":3: instruction is blank; write one, or remove the row"),
    "no output": ({"instruction": "I"}, ":3: no output or response; it has instruction, allowed columns are {columns}"),
    "empty row": ({}, ":3: no instruction; it has no columns, allowed columns are {columns}"),
    "number": ({**ROW, "instruction": 7}, ":3: instruction must be a text, found int 7"),
    "input list": ({**ROW, "input": ["x"]}, ":3: input must be a text, found list ['x']"),
    "context number": ({"instruction": "I", "context": 1.5, "output": "a"}, ":3: context must be a text, found float 1.5"),
    "topic number": ({**ROW, "topic": True}, ":3: topic must be a text, found bool True"),
    "output object": ({**ROW, "output": {}}, ":3: output must be a text or a list of texts, found dict {{}}"),
    "empty references": ({**ROW, "output": []}, ":3: output is an empty list; give at least one reference"),
    "reference number": ({**ROW, "output": ["a", 2]}, ":3: output[1] must be a text, found int 2"),
    "surrogate": (
        '{"instruction": "ab\\ud83d", "output": "a"}',
        ":3: instruction holds half a surrogate pair at character 2, which is no text",
    ),
    "long value": (
        {**ROW, "instruction": list(range(100))},
        f":3: instruction must be a text, found list {repr(list(range(100)))[:40]}…",
    ),
    "deep": ("[" * 100_000, ":3: not valid JSON (maximum recursion depth exceeded"),
    "huge number": ("1" * 5000, ":3: not valid JSON (Exceeds the limit (4300 digits)"),
}
COLUMNS = "instruction; input or context; output or response; category or topic"


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    line = line if isinstance(line, str) else json.dumps(line)
    source = text(tmp_path / "rows.jsonl", f"{json.dumps(ROW)}\n\n{line}\n")
    assert fails(source).startswith(f"{tmp_path}/rows.jsonl{message.format(columns=COLUMNS)}")


def test_a_bad_row_of_each_other_format_is_named(tmp_path: Path) -> None:
    good, bad = ROW, {**ROW, "instruction": " "}
    listed = text(tmp_path / "rows.json", json.dumps([good, bad]))
    assert fails(listed) == f"{tmp_path}/rows.json: row 2: instruction is blank; write one, or remove the row"
    table = text(tmp_path / "rows.csv", 'instruction,output\n"a\nb",c\n ,d\n')
    assert fails(table) == f"{tmp_path}/rows.csv:4: instruction is blank; write one, or remove the row"
    pq.write_table(pa.Table.from_pylist([good, bad]), tmp_path / "rows.parquet")
    assert (
        fails(LocalSource(tmp_path / "rows.parquet"))
        == f"{tmp_path}/rows.parquet: row 2: instruction is blank; write one, or remove the row"
    )


def test_undecodable_bytes_are_named_with_line_and_byte(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.csv"):
        source = text(tmp_path / name, b"instruction,output\n" if name.endswith("csv") else json.dumps(ROW).encode() + b"\n")
        source.path.write_bytes(source.path.read_bytes() + b"caf\xe9,x\n")
        assert fails(source) == (
            f"{tmp_path}/{name}:2: not UTF-8 (byte 4 of the line: invalid continuation byte); convert the file"
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", ": no rows; expected rows with the columns {columns}"),
        ("a.jsonl", "\n \r\n", ": no rows; expected rows with the columns {columns}"),
        ("a.json", "[]", ": no rows; expected rows with the columns {columns}"),
        ("a.csv", "instruction,output\n", ": no rows; expected rows with the columns {columns}"),
        ("a.json", '{"rows": []}', ": expected a list of rows or {{\"data\": [...]}}, found {{'rows': []}}"),
        ("a.json", "3", ': expected a list of rows or {{"data": [...]}}, found 3'),
        (
            "a.json",
            '{"a": 1}\n{"a": 2}\n',
            ": not valid JSON (Extra data at line 2, column 1); a file with one object a line must be named .jsonl",
        ),
        ("a.json", "[3]", ": row 1: expected an object with the columns {columns}, found int 3"),
        ("a.csv", "question,answer\na,b\n", ":1: no column instruction; it has question, answer, allowed columns are"),
        ("a.csv", "\ninstruction,answer\na,b\n", ":2: no column output or response; it has instruction, answer, allow"),
        ("a.csv", "instruction,output,output\na,b,c\n", ":1: column 'output' occurs twice in the header"),
        ("a.csv", "instruction,output\na,b\na,b,c\n", ":3: 3 fields, but the header has 2; quote fields that hold a"),
        ("a.csv", "instruction,output\na\n", ":2: 1 fields, but the header has 2; quote fields that hold a"),
        ("a.csv", 'instruction,output\na,b\n"a\n', ":3: not valid CSV (unexpected end of data)"),
        ("a.parquet", "PAR0", ": not valid Parquet ("),
        ("a.txt", "x", ": unknown format .txt; allowed: .jsonl, .json, .csv, .parquet"),
        ("a.jsonl.gz", "x", ": unknown format .gz; allowed: .jsonl, .json, .csv, .parquet"),
        ("rows", "x", ": unknown format (no suffix); allowed: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert fails(text(tmp_path / name, content)).startswith(f"{tmp_path}/{name}{message.format(columns=COLUMNS)}")


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "output": ["b"]}), tmp_path / "a.parquet")
    assert fails(LocalSource(tmp_path / "a.parquet")) == (
        f"{tmp_path}/a.parquet: no column instruction; it has text, output, allowed columns are {COLUMNS}"
    )


def test_a_slice_without_rows(tmp_path: Path) -> None:
    source = replace(jsonl(tmp_path / "rows.jsonl", *rows(3)), skip=3)
    assert fails(source) == f"{tmp_path}/rows.jsonl: no rows after skip=3; expected rows with the columns {COLUMNS}"


@pytest.mark.parametrize("use", [read_examples, source_digest])
def test_a_missing_file_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="^absent.jsonl: no such file") as caught:
        use(LocalSource(Path("absent.jsonl")))
    assert str(tmp_path / "absent.jsonl") in str(caught.value)
    with pytest.raises(DataError, match="^folder.jsonl: not a file; give one of the files inside it$"):
        use(LocalSource(Path("folder.jsonl")))


@pytest.mark.parametrize("use", [read_examples, source_digest])
def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Any) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROW)

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError) as caught:
        use(source)
    assert str(caught.value) == f"{tmp_path}/rows.jsonl: cannot be read (Permission denied); check the path and its permissions"


@given(st.binary(max_size=60))
def test_random_bytes_give_a_data_error_that_names_the_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        source = text(folder / f"a{suffix}", content)
        assert str(source.path) in fails(source)


# The bundled corpus


def test_every_bundled_file_can_be_read() -> None:
    assert {"train", "dev", "test_ni"} <= set(bundled_names())
    for name in bundled_names():
        found = read_examples(BundledSource(name))
        assert len({row.id for row in found}) == len(found) >= 20
        assert all(reference.strip() for row in found for reference in row.references)
    assert read_examples(BundledSource("dev", first=2, skip=1)) == read_examples(BundledSource("dev"))[1:3]


@pytest.mark.parametrize("use", [read_examples, source_digest])
def test_an_unknown_bundled_name_lists_what_there_is(use: Any) -> None:
    with pytest.raises(DataError) as caught:
        use(BundledSource("test_chta"))
    assert str(caught.value) == (
        f"bundled data 'test_chta' does not exist; there are {', '.join(bundled_names())}; did you mean test_chat?"
    )
    with pytest.raises(DataError, match=r"'\.\./README' does not exist; there are [a-z_, ]+$"):
        use(BundledSource("../README"))


# The hub


def test_a_hub_file_is_fetched_from_the_dataset_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = jsonl(tmp_path / "raw.jsonl", *rows(5))
    calls = []

    def download(*arguments: Any, **named: Any) -> str:
        calls.append((arguments, named))
        return str(local.path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = read_examples(HubSource("owner/name", "data/raw.jsonl", COMMIT, first=2, skip=1))
    assert found == read_examples(local)[1:3]
    assert calls == [(("owner/name", "data/raw.jsonl"), {"repo_type": "dataset", "revision": COMMIT, "force_download": False})]
    local.path.write_text("oops\n")
    assert fails(HubSource("owner/name", "raw.jsonl", COMMIT)).startswith(
        f"hf://datasets/owner/name@{COMMIT}/raw.jsonl:1: not valid JSON"
    )


class OddNetworkError(Exception):
    """The client's HTTP library has errors that descend from Exception alone."""


@pytest.mark.parametrize(
    "error", [OddNetworkError("refused\nsecond line"), FileNotFoundError("refused"), ValueError("refused")]
)
def test_a_hub_failure_says_how_to_go_on_without_it(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fails(HubSource("owner/name", "raw.jsonl", "main", what="data.dev")) == (
        "data.dev: cannot fetch raw.jsonl of owner/name@main (refused); check the names and the network, or use a local copy: "
        "--set data.dev='{kind: local, path: PATH}'"
    )


# Digests


def test_digests_identify_rows_wherever_the_file_is(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", *rows(3))
    same = jsonl(tmp_path / "two.jsonl", *rows(3))
    other = jsonl(tmp_path / "other.jsonl", *rows(4))
    table = LocalSource(tmp_path / "one.csv")
    table.path.write_bytes(one.path.read_bytes())
    assert source_digest(one) == source_digest(same)
    different = [one, other, replace(one, skip=1), replace(one, first=1), table, BundledSource("train"), BundledSource("dev")]
    digests = {source_digest(source) for source in different}
    assert len(digests) == len(different) and all(len(digest) == 64 for digest in digests)


def test_hub_digests_cover_repository_commit_file_and_slice_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    source = HubSource("owner/name", "raw.jsonl", COMMIT)
    others = [
        replace(source, repo="owner/other"),
        replace(source, file="valid.jsonl"),
        replace(source, revision="f" * 40),
        replace(source, first=3),
        replace(source, skip=3),
    ]
    assert len({source_digest(item) for item in [source, *others]}) == 6
    with pytest.raises(ValueError, match="owner/name@main: resolve the revision to a commit first"):
        source_digest(replace(source, revision="main"))


# Splits


def examples(count: int, first: int = 0) -> list[Example]:
    return [Example(f"{index:016x}", f"Question {index}", "", ("a",)) for index in range(first, first + count)]


def ids(found: list[Example]) -> set[str]:
    return {row.id for row in found}


def split_examples(rows: list[Example], sizes: dict[str, Any], seed: int) -> dict[str, list[Example]]:
    drawn = draw_parts(count_contents(rows), sizes, seed)
    return {part: [row for row in rows if drawn.get(int(row.id[:16], 16), "train") == part] for part in (*sizes, "train")}


def test_rows_of_a_part_are_read_anew_each_time_that_they_are_gone_through(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", *rows(30), *rows(3))
    everything = read_examples(source)
    drawn = draw_parts(count_contents(everything), {"dev": 6, "test": 3}, seed=1)
    parts = {part: Rows(source, part, drawn) for part in ("train", "dev", "test")}
    expected = split_examples(everything, {"dev": 6, "test": 3}, seed=1)
    for _ in range(2):
        assert {part: list(found) for part, found in parts.items()} == expected
    assert list(Rows(source)) == everything


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + "x" * 100_000 + "\n")
    found = iterate_examples(LocalSource(tmp_path / "rows.jsonl"))
    assert next(found).references == ("Red.",)  # the line after it was not looked at
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON"):
        next(found)


def test_a_json_array_may_not_be_larger_than_what_is_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_WHOLE", 1 << 20)
    content = json.dumps([{**ROW, "input": "x" * (1 << 20)}])
    assert "rows.json: larger than 1 MiB" in fails(text(tmp_path / "rows.json", content))
    assert len(read_examples(text(tmp_path / "rows.jsonl", content[1:-1]))) == 1


def test_a_split_is_exact_disjoint_and_keeps_the_order() -> None:
    everything = examples(50)
    parts = split_examples(everything, {"dev": 10, "test": 0.1}, seed=1)
    assert {name: len(found) for name, found in parts.items()} == {"dev": 10, "test": 5, "train": 35}
    assert sorted(row.id for found in parts.values() for row in found) == [row.id for row in everything]
    assert all(found == sorted(found, key=lambda row: row.id) for found in parts.values())


def test_a_split_depends_on_seed_and_ids_and_not_on_the_order() -> None:
    everything = examples(50)
    sizes = {"dev": 10, "test": 5}
    parts = split_examples(everything, sizes, seed=1)
    backwards = split_examples(everything[::-1], sizes, seed=1)
    assert {name: ids(found) for name, found in parts.items()} == {name: ids(found) for name, found in backwards.items()}
    assert ids(parts["dev"]) != ids(split_examples(everything, sizes, seed=2)["dev"])


def test_an_added_row_moves_at_most_one_row_out_of_each_part() -> None:
    sizes = {"dev": 10, "test": 5}
    before = split_examples(examples(50), sizes, seed=1)
    for extra in range(50, 90):
        after = split_examples([*examples(50), *examples(1, extra)], sizes, seed=1)
        assert len(ids(before["dev"]) - ids(after["dev"])) <= 1
        assert len(ids(before["test"]) - ids(after["test"])) <= 1


def test_a_larger_part_leaves_most_of_the_others_in_place() -> None:
    everything = examples(200)
    before = split_examples(everything, {"dev": 20, "test": 20}, seed=1)
    after = split_examples(everything, {"dev": 40, "test": 20}, seed=1)
    assert ids(before["dev"]) < ids(after["dev"])
    assert len(ids(before["test"]) & ids(after["test"])) >= 15


@pytest.mark.parametrize("seed", range(10))
def test_duplicates_that_do_not_fit_give_way_to_rows_that_do(seed: int) -> None:
    triples = [replace(row, id=row.id + suffix) for row in examples(10) for suffix in ("", "-2", "-3")]
    parts = split_examples([*triples, *examples(10, 10)], {"dev": 10, "test": 7}, seed)
    assert {name: len(found) for name, found in parts.items()} == {"dev": 10, "test": 7, "train": 23}
    assert sum(len({row.instruction for row in found}) for found in parts.values()) == 20


def test_exact_duplicates_are_never_separated() -> None:
    everything = [replace(row, id=row.id + suffix) for row in examples(20) for suffix in ("", "-2", "-3")]
    parts = split_examples(everything, {"dev": 9, "test": 12}, seed=4)
    assert (len(parts["dev"]), len(parts["test"])) == (9, 12)
    contents = [{row.instruction for row in found} for found in parts.values()]
    assert sum(len(found) for found in contents) == 20
    with pytest.raises(DataError, match="held-out part dev: cannot draw 10 rows without separating exact duplicates"):
        split_examples(everything, {"dev": 10}, seed=4)


def test_parts_must_leave_training_rows() -> None:
    message = r"held-out parts \{'dev': 3, 'test': 2\} leave no training rows: there are only 5 rows; lower them"
    with pytest.raises(DataError, match=message):
        split_examples(examples(5), {"dev": 3, "test": 2}, seed=0)
    assert split_examples(examples(5), {"dev": 0, "test": 4}, seed=0)["dev"] == []
    with pytest.raises(ValueError, match="'train' is the name of the rest"):
        split_examples(examples(5), {"train": 3}, seed=0)
