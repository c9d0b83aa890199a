"""Where rows come from: a local file, one file of a hub dataset, or the bundled corpus. All become `Example`s."""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import canonical_json, file_digest, text_digest
from pipeline.data.examples import Example
from pipeline.errors import DataError

INSTRUCTION = ("instruction",)
INPUT = ("input", "context")
OUTPUT = ("output", "response")
CATEGORY = ("category", "topic")

_COLUMNS = "instruction; input or context; output or response; category or topic"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID_DIGITS = 16
_MAX_NAMES = 20


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
    """

    repo: str
    file: str
    revision: str
    first: int | None = None
    skip: int = 0


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


def read_examples(source: Source) -> list[Example]:
    """The rows of a source, in file order.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed; the message names file and line or row.
    """
    with _located(source) as (path, label):
        examples = list(_slice(_examples(path, label), source))
        if not examples:
            taken = f" after skip={source.skip}" if source.skip else ""
            raise DataError(f"{label}: no rows{taken}; expected rows with the columns {_COLUMNS}")
    return examples


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


def split_examples(examples: Sequence[Example], parts: Mapping[str, int | float], seed: int) -> dict[str, list[Example]]:
    """Draw disjoint parts by a hash of seed, part and example id; the order of the rows plays no role.

    Exact duplicates go to the same part, so that no training row recurs in a held-out part. A part keeps its rows when
    other rows are added, but for those that give way to added ones.

    Args:
        examples: all rows.
        parts: name → size: rows (int) or a fraction of all rows (float, rounded).
        seed: another seed draws other parts.

    Returns:
        The parts, and under "train" the remaining rows, each in the order of `examples`.

    Raises:
        DataError: the parts leave no training rows, or a size cannot be met without separating duplicates.
    """
    if "train" in parts:
        raise ValueError("parts: 'train' is the name of the rest")
    sizes = {name: round(size * len(examples)) if isinstance(size, float) else size for name, size in parts.items()}
    if sum(sizes.values()) >= len(examples):
        raise DataError(f"held-out parts {sizes} leave no training rows: there are only {len(examples)} rows; lower them")
    free = Counter(_content_id(example) for example in examples)
    chosen: dict[str, str] = {}
    for name, size in sizes.items():
        drawn = _draw(free, size, f"{seed}:{name}", name)
        chosen |= dict.fromkeys(drawn, name)
        for content in drawn:
            del free[content]
    result: dict[str, list[Example]] = {name: [] for name in (*sizes, "train")}
    for example in examples:
        result[chosen.get(_content_id(example), "train")].append(example)
    return result


def bundled_names() -> list[str]:
    """Names of the bundled files."""
    return sorted(file.name.removesuffix(".jsonl") for file in _corpus().iterdir() if file.name.endswith(".jsonl"))


def _corpus() -> Any:
    return resources.files("pipeline.data.corpus")


def _draw(free: Mapping[str, int], size: int, salt: str, name: str) -> list[str]:
    drawn: list[str] = []
    missing = size
    for content in sorted(free, key=lambda content: text_digest(f"{salt}:{content}")):
        if free[content] <= missing:
            drawn.append(content)
            missing -= free[content]
        if not missing:
            return drawn
    raise DataError(f"held-out part {name}: cannot draw {size} rows without separating exact duplicates; choose another size")


def _content_id(example: Example) -> str:
    return example.id.partition("-")[0]


@contextlib.contextmanager
def _located(source: Source) -> Iterator[tuple[Path, str]]:
    """The file of a source and its name in messages."""
    if isinstance(source, LocalSource):
        yield source.path, str(source.path)
    elif isinstance(source, HubSource):
        yield _download(source), f"hf://datasets/{source.repo}@{source.revision}/{source.file}"
    else:
        names = bundled_names()
        if source.name not in names:
            close = difflib.get_close_matches(source.name, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"bundled data {source.name!r} does not exist; there are {', '.join(names)}{hint}")
        with resources.as_file(_corpus() / f"{source.name}.jsonl") as path:
            yield path, f"{source.name}.jsonl (bundled)"


def _download(source: HubSource) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repo, source.file, repo_type="dataset", revision=source.revision))
    # The client raises errors of its HTTP library, which differs between its versions: whatever it is, the user must know.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.file} of the hub dataset {source.repo}@{source.revision} cannot be fetched ({reason}); check the names "
            "and the network, or download the file elsewhere and give its path instead, for example --set data.train.path=FILE"
        ) from error


def _slice(examples: Iterator[Example], source: Source) -> Iterator[Example]:
    stop = None if source.first is None else source.skip + source.first
    return islice(examples, source.skip, stop)


def _examples(path: Path, label: str) -> Iterator[Example]:
    """Ids are numbered over the whole file, so a row has the same id in every slice."""
    seen: Counter[str] = Counter()
    try:
        for row in _reader(path, label)(path, label):
            yield _example(row, seen)
    except OSError as error:
        raise _unreadable(label, error) from None


def _example(row: _Row, seen: Counter[str]) -> Example:
    instruction = _text(row, INSTRUCTION, required=True)
    if not instruction.strip():
        raise DataError(f"{row.where}: instruction is blank; write one, or remove the row")
    context = _text(row, INPUT, required=False)
    references = _references(row)
    content = canonical_json([instruction, context, references])
    name = hashlib.sha256(content.encode()).hexdigest()[:_ID_DIGITS]
    seen[name] += 1
    suffix = f"-{seen[name]}" if seen[name] > 1 else ""
    return Example(name + suffix, instruction, context, references, _text(row, CATEGORY, required=False))


def _column(row: _Row, names: Sequence[str], required: bool) -> tuple[str, Any]:
    """Name and value of the one column of `names` that the row has; a null is a column that is not there."""
    found = [name for name in names if row.values.get(name) is not None]
    if required and not found:
        null = [name for name in names if name in row.values]
        lack = f"{null[0]} is null" if null else f"no {' or '.join(names)}"
        has = _names(row.values) or "no columns"
        raise DataError(f"{row.where}: {lack}; it has {has}, allowed columns are {_COLUMNS}")
    if len({json.dumps(row.values[name], default=str) for name in found}) > 1:
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
    text = "".join(line for _, line in _lines(path, label))
    data = _parse(text, label, "; a file with one object a line must be named .jsonl")
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise DataError(f'{label}: expected a list of rows or {{"data": [...]}}, found {_short(data)}')
    for number, values in enumerate(rows, start=1):
        where = f"{label}: row {number}"
        yield _row(values, where)


def _csv_rows(path: Path, label: str) -> Iterator[_Row]:
    # Process-wide and only ever raised: the default stops at contexts of 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
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


def _lines(path: Path, label: str) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends as they are, without a byte-order mark."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{label}:{number}: not UTF-8 (byte {error.start + 1} of the line: {error.reason}); convert the file"
                ) from None


def _parse(text: str, where: str, hint: str = "") -> Any:
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
