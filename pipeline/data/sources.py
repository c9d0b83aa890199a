"""Where rows come from: a local file, one file of a hub dataset, or the bundled corpus. All become `Example`s."""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import canonical_json, file_digest, text_digest
from pipeline.data.examples import Example
from pipeline.errors import DataError
from pipeline.hub import fetch_file

INSTRUCTION = ("instruction",)
INPUT = ("input", "context")
OUTPUT = ("output", "response")
CATEGORY = ("category", "topic")

_COLUMNS = "instruction; input or context; output or response; category or topic"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID_DIGITS = 16
_MAX_NAMES = 20
_MAX_LINE = 64 << 20
_MAX_WHOLE = 128 << 20
"""Bytes of a line, and of a .json file, which is read as a whole."""


@dataclass(frozen=True)
class LocalSource:
    """A .jsonl, .json, .csv or .parquet file on disk.

    Attributes:
        path: the file.
        first: rows taken after the skipped ones; None takes all.
        skip: rows left out at the start of the file.
    """

    path: Path
    first: int | None = None
    skip: int = 0


@dataclass(frozen=True)
class HubSource:
    """One file of a dataset repository on the hub.

    Attributes:
        repo: owner/name.
        file: path inside the repository.
        revision: commit, tag or branch; a commit wherever the rows are fingerprinted (`pipeline.hub.resolve_revision`).
        first: rows taken after the skipped ones; None takes all.
        skip: rows left out at the start of the file.
        what: dotted path of the setting, for messages.
    """

    repo: str
    file: str
    revision: str
    first: int | None = None
    skip: int = 0
    what: str = field(default="data.train", compare=False)


@dataclass(frozen=True)
class BundledSource:
    """A file of the instruction corpus inside this package.

    Attributes:
        name: file name without suffix.
        first: rows taken after the skipped ones; None takes all.
        skip: rows left out at the start of the file.
    """

    name: str
    first: int | None = None
    skip: int = 0


Source = LocalSource | HubSource | BundledSource


@dataclass(frozen=True)
class _Row:
    """A row as parsed, and where it is, for messages."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a source, read anew each time that they are iterated, see `iterate_examples`.

    Attributes:
        source: the file.
        part: which of them: a held-out part, or "train" for the rest.
        drawn: what `draw_parts` gave to the held-out parts.
        sizes: rows of each part, as far as they are known.
    """

    source: Source
    part: str = "train"
    drawn: Mapping[int, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def count(self) -> int:
        """How many there are; where that is not known, they are read."""
        return self.sizes[self.part] if self.part in self.sizes else sum(1 for _ in self)

    def __iter__(self) -> Iterator[Example]:
        return (row for row in iterate_examples(self.source) if self.drawn.get(_content(row), "train") == self.part)


def iterate_examples(source: Source) -> Iterator[Example]:
    """The rows of a source, in file order, each when it is asked for.

    Lines, CSV records and Parquet row groups are read one after another, so memory does not grow with the file but for
    eight bytes of hash a row, which number the duplicates; only a .json array is read as a whole, and limited in size.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed; the message names file and line or row.
    """
    with _located(source) as (path, label):
        empty = True
        for example in _slice(_examples(path, label), source):
            empty = False
            yield example
        if empty:
            taken = f" after skip={source.skip}" if source.skip else ""
            raise DataError(f"{label}: no rows{taken}; expected rows with the columns {_COLUMNS}")


def source_digest(source: Source) -> str:
    """SHA-256 identity of a source's rows, for fingerprints: the same rows give the same digest wherever the file is.

    Local and bundled files are identified by their content, hub files by repository, commit and path without a download.

    Raises:
        DataError: the file is missing or unreadable.
        ValueError: a hub source whose revision is not a commit, which could change behind the digest.
    """
    identity: dict[str, Any] = {"skip": source.skip, "first": source.first}
    if isinstance(source, HubSource):
        if not _COMMIT.fullmatch(source.revision):
            raise ValueError(f"{source.repo}@{source.revision}: resolve the revision to a commit first")
        identity |= {"repo": source.repo, "commit": source.revision, "file": source.file}
    else:
        with _located(source) as (path, label):
            _reader(path, label)
            try:
                identity |= {"format": path.suffix.lower(), "sha256": file_digest(path)}
            except OSError as error:
                raise _unreadable(label, error) from None
    return text_digest(canonical_json(identity))


def count_contents(examples: Iterable[Example]) -> Counter[int]:
    """How many rows have each content, as `draw_parts` wants it."""
    return Counter(map(_content, examples))


def draw_parts(contents: Mapping[int, int], parts: Mapping[str, int | float], seed: int) -> dict[int, str]:
    """Draw disjoint parts by a hash of seed, part and content; the order of the rows plays no role.

    Exact duplicates go to the same part, so that no training row recurs in a held-out part. A part keeps its rows when
    other rows are added, but for those that give way to added ones.

    Args:
        contents: all rows, see `count_contents`.
        parts: name → size: rows (int) or a fraction of all rows (float, rounded).
        seed: another seed draws other parts.

    Returns:
        Content → part, for `Rows`; what is not in it stays for training.

    Raises:
        DataError: the parts leave no training rows, or a size cannot be met without separating duplicates.
    """
    if "train" in parts:
        raise ValueError("parts: 'train' is the name of the rest")
    rows = sum(contents.values())
    sizes = {name: round(size * rows) if isinstance(size, float) else size for name, size in parts.items()}
    if sum(sizes.values()) >= rows:
        raise DataError(f"held-out parts {sizes} leave no training rows: there are only {rows} rows; lower them")
    drawn: dict[int, str] = {}
    for name, size in sizes.items():
        free = {content: count for content, count in contents.items() if content not in drawn} if size else {}
        drawn |= dict.fromkeys(_draw(free, size, f"{seed}:{name}", name), name)
    return drawn


def bundled_names() -> list[str]:
    """Names of the bundled files."""
    return sorted(file.name.removesuffix(".jsonl") for file in _corpus().iterdir() if file.name.endswith(".jsonl"))


def _corpus() -> Any:
    return resources.files("pipeline.data.corpus")


def _draw(free: Mapping[int, int], size: int, salt: str, name: str) -> list[int]:
    drawn: list[int] = []
    missing = size
    for content in sorted(free, key=lambda content: hashlib.sha256(f"{salt}:{content:0{_ID_DIGITS}x}".encode()).digest()):
        if not missing:
            break
        if free[content] <= missing:
            drawn.append(content)
            missing -= free[content]
    if missing:
        raise DataError(
            f"held-out part {name}: cannot draw {size} rows without separating exact duplicates; choose another size"
        )
    return drawn


def _content(example: Example) -> int:
    """The part of an id that comes from the content, as a number, which takes less memory."""
    return int(example.id[:_ID_DIGITS], 16)


@contextlib.contextmanager
def _located(source: Source) -> Iterator[tuple[Path, str]]:
    """The file of a source and its name in messages."""
    if isinstance(source, LocalSource):
        yield source.path, str(source.path)
    elif isinstance(source, HubSource):
        path = fetch_file(source.repo, source.file, source.revision, source.what)
        yield path, f"hf://datasets/{source.repo}@{source.revision}/{source.file}"
    else:
        names = bundled_names()
        if source.name not in names:
            close = difflib.get_close_matches(source.name, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"bundled data {source.name!r} does not exist; there are {', '.join(names)}{hint}")
        with resources.as_file(_corpus() / f"{source.name}.jsonl") as path:
            yield path, f"{source.name}.jsonl (bundled)"


def _slice(examples: Iterator[Example], source: Source) -> Iterator[Example]:
    stop = None if source.first is None else source.skip + source.first
    return islice(examples, source.skip, stop)


def _examples(path: Path, label: str) -> Iterator[Example]:
    """Ids are numbered over the whole file, so a row has the same id in every slice."""
    seen: Counter[int] = Counter()
    try:
        for row in _reader(path, label)(path, label):
            yield _example(row, seen)
    except OSError as error:
        raise _unreadable(label, error) from None


def _example(row: _Row, seen: Counter[int]) -> Example:
    instruction = _text(row, INSTRUCTION, required=True)
    if not instruction.strip():
        raise DataError(f"{row.where}: instruction is blank; write one, or remove the row")
    context = _text(row, INPUT, required=False)
    references = _references(row)
    content = canonical_json([instruction, context, references])
    name = hashlib.sha256(content.encode()).hexdigest()[:_ID_DIGITS]
    number = int(name, 16)
    seen[number] += 1
    suffix = f"-{seen[number]}" if seen[number] > 1 else ""
    return Example(name + suffix, instruction, context, references, _text(row, CATEGORY, required=False))


def _column(row: _Row, names: Sequence[str], required: bool) -> tuple[str, Any]:
    """Name and value of the one column of `names` that the row has; a null is a column that is not there."""
    found = [name for name in names if row.values.get(name) is not None]
    if required and not found:
        null = [name for name in names if name in row.values]
        lack = f"{null[0]} is null" if null else f"no {' or '.join(names)}"
        has = _names(row.values) or "no columns"
        raise DataError(f"{row.where}: {lack}; it has {has}, allowed columns are {_COLUMNS}")
    if len(found) > 1 and len({json.dumps(row.values[name], default=str) for name in found}) > 1:
        raise DataError(f"{row.where}: {' and '.join(found)} differ, though both stand for the same; keep one of them")
    return (found[0], row.values[found[0]]) if found else (names[0], "")


def _text(row: _Row, names: Sequence[str], required: bool) -> str:
    name, value = _column(row, names, required)
    return _checked(row, name, value, "a text")


def _references(row: _Row) -> tuple[str, ...]:
    name, value = _column(row, OUTPUT, required=True)
    if not isinstance(value, list):
        return (_checked(row, name, value, "a text or a list of texts"),)
    if not value:
        raise DataError(f"{row.where}: {name} is an empty list; give at least one reference")
    return tuple(_checked(row, f"{name}[{index}]", item, "a text") for index, item in enumerate(value))


def _checked(row: _Row, name: str, value: Any, expected: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {name} must be {expected}, found {type(value).__name__} {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: {name} holds half a surrogate pair at character {error.start}, which is no text; remove it"
        ) from None
    return value


def _reader(path: Path, label: str) -> Callable[[Path, str], Iterator[_Row]]:
    """The reader of a file's format, after a check that the file is there."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{label}: unknown format {path.suffix or '(no suffix)'}; allowed: {', '.join(_READERS)}")
    try:
        if not path.exists():
            raise DataError(f"{label}: no such file (looked for {path.absolute()}); check the path")
        if not path.is_file():
            raise DataError(f"{label}: not a file; give one of the files inside it")
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise _unreadable(label, error) from None
    return reader


def _unreadable(label: str, error: OSError) -> DataError:
    return DataError(f"{label}: cannot be read ({error.strerror or error}); check the path and its permissions")


def _jsonl_rows(path: Path, label: str) -> Iterator[_Row]:
    for number, line in _lines(path, label):
        if line.strip():
            where = f"{label}:{number}"
            yield _row(_parse(line.rstrip("\r\n"), where), where)


def _json_rows(path: Path, label: str) -> Iterator[_Row]:
    if path.stat().st_size > _MAX_WHOLE:
        raise DataError(
            f"{label}: larger than {_MAX_WHOLE >> 20} MiB, and .json is read as a whole; write it as .jsonl, one object a "
            "line, which is read row by row (jq -c '.[]' rows.json > rows.jsonl)"
        )
    text = "".join(line for _, line in _lines(path, label, _MAX_WHOLE))
    data = _parse(text, label, "; a file with one object a line must be named .jsonl")
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise DataError(f'{label}: expected a list of rows or {{"data": [...]}}, found {_short(data)}')
    for number, values in enumerate(rows, start=1):
        where = f"{label}: row {number}"
        yield _row(values, where)


def _csv_rows(path: Path, label: str) -> Iterator[_Row]:
    # Process-wide and only ever raised: the default stops at contexts of 128 KiB.
    csv.field_size_limit(_MAX_LINE)
    reader = csv.reader((line for _, line in _lines(path, label)), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{label}:{line}: not valid CSV ({error}); quote fields that hold quotes") from None
        if values is None:
            return
        if not values:
            continue
        where = f"{label}:{line}"
        if not header:
            header = _csv_header(values, where)
        elif len(values) != len(header):
            raise DataError(
                f"{where}: {len(values)} fields, but the header has {len(header)}; quote fields that hold a comma or line break"
            )
        else:
            yield _Row(where, dict(zip(header, values, strict=True)))


def _csv_header(values: list[str], where: str) -> list[str]:
    twice = [name for name, count in Counter(values).items() if count > 1]
    if twice:
        raise DataError(f"{where}: column {twice[0]!r} occurs twice in the header; rename one")
    _require_columns(values, where)
    return values


def _parquet_rows(path: Path, label: str) -> Iterator[_Row]:
    try:
        with pq.ParquetFile(path) as file:
            _require_columns(file.schema_arrow.names, label)
            wanted = [name for name in file.schema_arrow.names if name in (*INSTRUCTION, *INPUT, *OUTPUT, *CATEGORY)]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield _Row(f"{label}: row {number}", values)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; Arrow's own, for pages that are damaged, have no number
        reason = _short(" ".join(str(error).split()), 300)[1:-1]
        raise DataError(f"{label}: not valid Parquet ({reason}); write the file again") from None


_READERS: dict[str, Callable[[Path, str], Iterator[_Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _require_columns(names: Sequence[str], where: str) -> None:
    for group in (INSTRUCTION, OUTPUT):
        if not set(group) & set(names):
            raise DataError(
                f"{where}: no column {' or '.join(group)}; it has {_names(names) or 'none'}, allowed columns are {_COLUMNS}"
            )


def _names(names: Iterable[Any]) -> str:
    """Columns for a message: a few of them, with nothing that a terminal would obey."""
    found = [str(name) for name in names]
    shown = [name if name.isprintable() and len(name) <= 40 else _short(name) for name in found[:_MAX_NAMES]]
    return ", ".join([*shown, *(["…"] if len(found) > _MAX_NAMES else [])])


def _lines(path: Path, label: str, longest: int = _MAX_LINE) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends as they are, without a byte-order mark."""
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(longest + 1), b""), start=1):
            if len(line) > longest:
                raise DataError(f"{label}:{number}: a line of more than {longest >> 20} MiB; split its row, or remove it")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{label}:{number}: not UTF-8 (byte {error.start + 1} of the line: {error.reason}); convert the file"
                ) from None


def _parse(text: str, where: str, hint: str = "; write the row as one JSON object") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {at}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}){hint}") from None


def _row(values: Any, where: str) -> _Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: expected an object with the columns {_COLUMNS}, found {type(values).__name__} {_short(values)}"
        )
    return _Row(where, values)


def _short(value: Any, length: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
