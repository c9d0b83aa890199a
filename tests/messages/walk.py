"""Every place in the code that makes a message for the user, found in the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLE = "{}"


@dataclass(frozen=True)
class Site:
    """One place that makes a message.

    Attributes:
        file: path in the project.
        where: function, with its class.
        kind: name of the exception; "warning" for a line in the log, "print" for one on the terminal.
        text: its words, `{}` where something is filled in.
        lines: first and last line of the expression.
    """

    file: str
    where: str
    kind: str
    text: str
    lines: tuple[int, int]

    def makes(self, message: str) -> bool:
        """Whether a message has this site's words."""
        words = self.text.split(HOLE)
        return any(word.strip() for word in words) and re.search(".*?".join(map(re.escape, words)), message, re.S) is not None


@cache
def errors() -> frozenset[str]:
    """Names of the exceptions that are messages: PipelineError and what descends from it."""
    found, before = {"PipelineError"}, 0
    classes = [node for file in _files() for node in ast.walk(_tree(file)) if isinstance(node, ast.ClassDef)]
    while len(found) > before:
        before = len(found)
        found |= {node.name for node in classes if any(ast.unparse(base) in found for base in node.bases)}
    return frozenset(found)


@cache
def sites() -> tuple[Site, ...]:
    """All of them. A ValueError counts where the configuration's validators raise it: pydantic makes a message of it."""
    return tuple(site for file in _files() for site in _in_file(file))


def _files() -> list[Path]:
    return [path for folder in ("pipeline", "tasks", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _in_file(file: Path) -> Iterator[Site]:
    name, tree = str(file.relative_to(ROOT)), _tree(file)
    classes = errors() | {
        ast.unparse(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "type[PipelineError]"
    }
    if name.startswith("pipeline/config/"):
        classes |= {"ValueError"}
    for where, scope, call in _calls(tree, "", tree):
        kind = _kind(call, classes)
        if kind is not None:
            text = _text(call.args[0], _assigned(scope))
            yield Site(name, where, kind, text, (call.lineno, call.end_lineno or call.lineno))


def _calls(node: ast.AST, where: str, scope: ast.AST) -> Iterator[tuple[str, ast.AST, ast.Call]]:
    """Calls with the function that they are in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = child if isinstance(child, ast.FunctionDef) else scope
            yield from _calls(child, f"{where}.{child.name}".lstrip("."), inner)
            continue
        if isinstance(child, ast.Call) and child.args:
            yield where, scope, child
        yield from _calls(child, where, scope)


def _kind(call: ast.Call, classes: frozenset[str]) -> str | None:
    name = ast.unparse(call.func)
    if name in classes:
        return name
    if name in ("log.warning", "log.error", "warnings.warn"):
        return "warning"
    if name == "print" and any(ast.unparse(keyword.value) == "sys.stderr" for keyword in call.keywords):
        return "print"
    return None


def _assigned(scope: ast.AST) -> dict[str, ast.AST]:
    """Name → what is assigned to it in a function, where that is done once."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def _text(node: ast.AST, names: dict[str, ast.AST]) -> str:
    """The words of an expression, `{}` for what is only known later."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[a-z.0-9]+", HOLE, node.value)  # also of the log's lines
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id in names:
        inner = _text(names[node.value.id], {})
        return inner if inner.strip() != HOLE and len(inner) > 12 else HOLE
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format" and node.args:
        return _text(node.args[0], names)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "plain":
        return _text(node.args[0], names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.Name) and node.id in names:
        return _text(names[node.id], {})
    return HOLE
