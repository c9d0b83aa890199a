"""How many examples, what a command did, and ways to spoil a configuration or a data file."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pipeline import cli

ALL = os.environ.get("DISTILLLENS_FAULTS") == "all"
MAX_LINES = 40
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_touched: list[str] | None = None


def examples(count: int) -> settings:
    """So many examples, a tenth of them unless all are asked for; the same in every run."""
    return settings(
        max_examples=count if ALL else count // 10,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, what it printed, paths that it wrote to or changed."""

    code: int
    out: str
    err: str
    touched: tuple[str, ...]


def run(*arguments: str) -> Outcome:
    """The command line in this process; an exception that is no exit would be a traceback, and is let through."""
    out, err = io.StringIO(), io.StringIO()
    handlers, arguments_before = logging.root.handlers[:], sys.argv
    sys.argv = ["distilllens", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), watched() as touched:
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        sys.argv, logging.root.handlers = arguments_before, handlers
    return Outcome(code, out.getvalue(), err.getvalue(), tuple(touched))


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Paths that Python code opens for writing, makes, renames or removes meanwhile."""
    global _touched
    touched: list[str] = []
    _touched = touched
    try:
        yield touched
    finally:
        _touched = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _touched is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITING):
            _touched.append(str(path))
    elif event in _CHANGING:
        _touched.append(f"{event} {arguments[0]}")


sys.addaudithook(_hear)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything under a folder."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def refusal(outcome: Outcome) -> str:
    """The message of a command that refused its input, checked for form; empty where it did not refuse."""
    assert outcome.code in (0, 2), outcome
    # At the start of a line: as a key, the word itself is drawn at times, from the constants of this file.
    assert not re.search(r"^Traceback \(", outcome.err + outcome.out, re.MULTILINE), outcome
    if outcome.code == 0:
        return ""
    assert outcome.err.strip() and outcome.err.count("\n") <= MAX_LINES, outcome
    assert len(outcome.err) < 20_000, outcome.err[:500]
    # Nothing that a terminal would obey: no escapes, no change of writing direction.
    assert all(letter.isprintable() or letter in "\n" for letter in outcome.err), ascii(outcome.err)
    return outcome.err


# Configurations

NUMBERS: list[Any] = [
    0, -1, 1, 7, 2**31, 10**9, 10**12, 10**18, 2**63, -(2**70), 10**400,
    0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "null", "~", "0", "1e400", "../../etc/passwd", "/etc/passwd", "/dev/zero",
    "/proc/self/mem", "..", ".", "a/../../b",
    "C:\\x", "\\\\host\\share", "a\0b", "\x1b[31mred\x1b[0m", "\r\n", "‮gnp.exe", "\U0001f600",
    "é" * 300, "x" * 5000, "x" * 100_000, "[/bold]", "a\u2066b\u2069", "\x9b31m", "\u200b", "a\u0085b",
    "<script>alert(1)</script>", "${HOME}", "$(id)", "`id`", "{{ 7*7 }}", "%s%n", "a=b", "a:b",
    "file:///etc/passwd", "http://127.0.0.1:1/x", "!!python/object/apply:os.system [id]", "*a", "&a", "os", "antigravity.x",
]  # fmt: skip
NAMES = [
    "name",
    "kind",
    "path",
    "include",
    "",
    "a.b",
    "0",
    "<<",
    "__class__",
    "model_config",
    "\x1b[2J",
    "z" * 3000,
    "\u202ea",
    "a\u2066",
]


def _nested(levels: int) -> Any:
    return [_nested(levels - 1)] if levels else 0


LARGE = [list(range(1500)), [[0] * 100] * 30, {f"k{index}": index for index in range(1500)}, *map(_nested, (20, 31, 60, 150))]


def values() -> st.SearchStrategy[Any]:
    """Whatever could stand where something else belongs."""
    leaves = st.one_of(
        st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(),
        st.text(max_size=20), st.binary(max_size=8), st.dates(),
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=6,
    ) | st.sampled_from(LARGE).map(copy.deepcopy)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything under a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, child in items:
        found += [(*at, key), *places(child, (*at, key))]
    return found


@st.composite
def spoilt(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """A configuration with one to three changes: a key left out, renamed, moved or set to something else."""
    changed = yaml.safe_load(yaml.safe_dump(content))
    for _ in range(draw(st.integers(1, 3))):
        known = places(changed)
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        holder = changed
        for key in way:
            holder = holder[key]
        change = draw(st.sampled_from(["drop", "rename", "replace", "replace", "add", "wrap", "move"]))
        if change == "drop":
            del holder[last]
        elif change == "replace":
            holder[last] = draw(values())
        elif change == "wrap":
            holder[last] = [holder[last]] if draw(st.booleans()) else {draw(st.sampled_from(NAMES)): holder[last]}
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(NAMES) | st.just(f"{last}x") | st.text(max_size=8))] = holder.pop(last)
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(NAMES) | st.text(max_size=8))] = draw(values())
        elif change == "move":
            changed[str(last)] = holder[last]
    return changed


def text_changes() -> st.SearchStrategy[tuple[str, float, str]]:
    """A change of a file's text: what is done, where (as a share of the length), and with what."""
    pieces = [
        "\0", "\t", "\x1b", "﻿", "‮", "\r", ":", "- ", "{", "[", "&a ", "*a ", "<<: *a", "!!python/name:os.system ", "!!binary x",
        "? ", "|", ">", "%YAML 9.9", "---\n", "...\n", "'", '"', "2001-99-99", "1:" * 200 + "1", "0x" + "f" * 4000, "[" * 400,
        "a: &a [*a]",
        "😀", "é",
    ]  # fmt: skip
    return st.tuples(st.sampled_from(["insert", "cut", "double", "end"]), st.floats(0, 1), st.sampled_from(pieces))


def change_text(text: str, changes: list[tuple[str, float, str]]) -> str:
    """Apply them."""
    for what, share, piece in changes:
        at = int(share * len(text))
        end = text.find("\n", at) + 1 or len(text)
        if what == "insert":
            text = text[:at] + piece + text[at:]
        elif what == "cut":
            text = text[:at] + text[at + len(piece) :]
        elif what == "double":
            text = text[:end] + text[at:end] + text[end:]
        else:
            text = text[:at]
    return text


# Bytes


def byte_changes() -> st.SearchStrategy[tuple[str, float, bytes]]:
    """A change of a file's bytes."""
    pieces = st.sampled_from(
        [
            b"\0", b"\xff\xfe", b"\xc3\x28", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b'"', b",", b"{",
            b"[" * 3000, b"]",
            b"\\ud800",
            b"\xe2\x80\xae", "😀".encode(), b"9" * 5000, b"NaN", b"x" * 70_000, b"\x1b[2J", b"null", b'{"instruction": 1}\n',
            b"PAR1",
            b"\xff" * 8, b"\x7f" * 8, b"\x00" * 8,
        ]
    )  # fmt: skip
    return st.tuples(
        st.sampled_from(["insert", "cut", "put", "double", "end"]), st.floats(0, 1), pieces | st.binary(max_size=9)
    )


def change_bytes(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Apply them."""
    for what, share, piece in changes:
        at = int(share * len(content))
        if what == "insert":
            content = content[:at] + piece + content[at:]
        elif what == "cut":
            content = content[:at] + content[at + len(piece) :]
        elif what == "put":
            content = content[:at] + piece + content[at + len(piece) :]
        elif what == "double":
            content = content[:at] + content[max(0, at - 200) :]
        else:
            content = content[:at]
    return content
