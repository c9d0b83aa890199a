"""YAML with `include`, --set overrides, and every problem in one message."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.base import beyond_limits
from pipeline.config.experiment import Experiment
from pipeline.config.sweep import Sweep
from pipeline.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Keys and values of one file, every alias counted with all that it stands for."""
MAX_FILES = 64
"""Files that one configuration reads through its includes."""
_MAX_SCALAR = 100  # characters of a number, date or truth value; reading longer ones takes quadratic time
_MAX_PROBLEMS = 30
_INT_BITS = 63
Model = TypeVar("Model", bound=BaseModel)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, apply overrides and validate.

    Args:
        path: YAML file. `include: [other.yaml]` merges other files first (paths relative to this file).
        overrides: `dotted.path=value`, the value in YAML; `X.path=…` turns the data source X into a local one.

    Raises:
        ConfigError: anything is wrong; all problems at once.
    """
    return validate(Experiment, apply_overrides(read_yaml(path), overrides), str(path))


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file; its base experiment is found relative to it.

    Raises:
        ConfigError: anything is wrong; all problems at once.
    """
    sweep = validate(Sweep, read_yaml(path), str(path))
    return sweep.model_copy(update={"experiment": path.resolve().parent / sweep.experiment})


def validate(model: type[Model], raw: Mapping[str, Any], source: str) -> Model:
    """Build a frozen model from plain data.

    Raises:
        ConfigError: one line per problem: dotted path, what is wrong, what is allowed.
    """
    try:
        found = model.model_validate(raw)
        problems = [shown(problem, 600) for problem in beyond_limits(found)]
    except ValidationError as error:
        problems = [_problem(model, item) for item in error.errors()]
    if problems:
        raise ConfigError(first_problems(problems), source)
    return found


def first_problems(problems: list[str]) -> list[str]:
    """As many as fit a screen, and how many more there are."""
    more = len(problems) - _MAX_PROBLEMS
    return problems if more <= 0 else [*problems[:_MAX_PROBLEMS], f"and {more} more; mend these first"]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with its includes merged: this file's values win over included ones, later includes over earlier.

    Raises:
        ConfigError: not readable, not YAML, not a mapping, too large, or an include that includes itself.
    """
    return _with_includes(path, (), iter(range(MAX_FILES)))


def _with_includes(path: Path, including: tuple[Path, ...], left: Iterator[int]) -> dict[str, Any]:
    try:
        path = path.resolve()
    except (ValueError, RuntimeError) as error:  # a NUL byte; links in a circle
        raise ConfigError(f"no usable path ({error}); give the path of a YAML file", shown(str(path))) from None
    if path in including:
        way = " → ".join(p.name for p in including)
        raise ConfigError(f"include: {path.name} includes itself through {way}; remove it there", str(path))
    if next(left, None) is None:
        raise ConfigError(f"include: more than {MAX_FILES} files are read; include each once", str((including or (path,))[0]))
    own = _parse(path)
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(item, str) for item in includes):
        raise ConfigError(f"include: {_short(includes)} must be a list of file names", str(path))
    other = [item for item in includes if Path(item).suffix not in (".yaml", ".yml")]
    if other:
        raise ConfigError(f"include: {_short(other[0])} must be the name of a .yaml or .yml file", str(path))
    merged: dict[str, Any] = {}
    for item in includes:
        merged = _merge(merged, _with_includes(path.parent / item, (*including, path), left))
    return _merge(merged, own)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `dotted.path=value` settings; local paths first, so that row limits given beside them are kept.

    Raises:
        ConfigError: a setting without "=", a value that is not YAML, or a path through something that is no mapping.
    """
    return apply_settings(raw, dict(_parse_override(text) for text in overrides))


def apply_settings(raw: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted path → value; local paths first, so that row limits given beside them are kept.

    Raises:
        ConfigError: a path through something that is no mapping.
    """
    for name, value in sorted(settings.items(), key=lambda item: item[0].rpartition(".")[2] != "path"):
        raw = _set(raw, name.split("."), value)
    return raw


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError("not a file; give the path of a YAML file", str(path))
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"longer than {MAX_BYTES} bytes, but an experiment file has at most that; give another file", str(path)
            )
        value = _read(content.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); give the path of a YAML file", shown(str(path))) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start + 1}: {error.reason}); convert the file", str(path)) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not YAML that can be used here: {_first_words(error)}; write it otherwise", str(path)) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"must be a mapping of names to values, found {type(value).__name__}; write name: value", str(path))
    return value


def _read(text: str) -> Any:
    """What a YAML text says; its size is measured before anything is built, since aliases can stand for exponentially much.

    Raises:
        yaml.YAMLError, RecursionError, ValueError: it is not YAML, or more than a configuration can be.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Nodes and levels under a node, aliases expanded; each node is visited once."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError(f"{_at(node)}: an alias stands for something that holds it; write it out")
        return found
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
        parts = []
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [_measure(child, known) for pair in node.value for child in pair]
    else:
        parts = [_measure(child, known) for child in node.value]
    measured = 1 + sum(count for count, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    if measured[0] > MAX_NODES:
        raise ValueError(
            f"{_at(node)}: more than {MAX_NODES} keys and values (aliases count with all that they stand for); write less"
        )
    if measured[1] > MAX_DEPTH:
        raise ValueError(f"{_at(node)}: nested deeper than {MAX_DEPTH} levels; write it flatter")
    known[id(node)] = measured
    return measured


def _check_scalar(node: yaml.ScalarNode) -> None:
    kind = node.tag.rpartition(":")[2]
    if kind == "str":
        return
    if len(node.value) > _MAX_SCALAR:
        raise ValueError(f"{_at(node)}: {kind} of {len(node.value)} characters; there are at most {_MAX_SCALAR}")
    if kind == "int" and yaml.SafeLoader("").construct_yaml_int(node).bit_length() > _INT_BITS:
        raise ValueError(f"{_at(node)}: {node.value} is beyond whole numbers of {_INT_BITS + 1} bits; lower it")


def _check_keys(node: yaml.MappingNode) -> None:
    """YAML's own reader takes the last of two equal keys without a word."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise ValueError(f"{_at(key)}: the key {shown(key.value)} occurs twice in its mapping; remove one")
            seen.add((key.tag, key.value))


def _at(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"


def _first_words(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if not (isinstance(value, dict) and isinstance(merged.get(key), dict)):
            merged[key] = value
            continue
        kind = merged[key].get("kind")
        # As with --set: a path makes a source or model of another kind a local one.
        if "path" in value and "kind" not in value and kind is not None:
            value = {"kind": "local", **value}
        # A mapping with another `kind` is another thing: its predecessor's keys would only be unknown keys.
        merged[key] = _merge(merged[key], value) if value.get("kind", kind) == kind else value
    return merged


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not all(name.strip().split(".")):
        raise ConfigError(f"--set {shown(text)}: write it as dotted.path=value")
    try:
        return name.strip(), _read(value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--set {shown(text)}: the value is not YAML ({_first_words(error)}); write it otherwise") from None


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"{shown('.'.join(keys))}: {len(keys)} names, but settings are at most {MAX_DEPTH} deep; shorten it")
    head, *rest = keys
    if not rest:
        if head == "path" and raw.get("kind", "local") != "local":
            return {"kind": "local", "path": value}
        return {**raw, head: value}
    child = raw.get(head)
    if child is not None and not isinstance(child, dict):
        raise ConfigError(
            f"{shown('.'.join(keys))}: {shown(head)} is {_short(child)}, which has no keys; set {shown(head)} as a whole"
        )
    return {**raw, head: _set(child or {}, rest, value)}


def _problem(root: type[BaseModel], error: Any) -> str:
    model, dotted = _locate(root, error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = list(model.model_fields) if model else []
        return f"{dotted}: unknown key{_did_you_mean(str(error['loc'][-1]), allowed)}"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        allowed = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        return f"{dotted}.kind: {_short(context['tag'])} is not known{_did_you_mean(context['tag'], allowed)}"
    if error["type"] == "union_tag_not_found":
        return f"{dotted}: needs a `kind`; add it"
    if error["type"] == "missing":
        return f"{dotted}: missing; add it"
    message = shown(str(error["msg"]).removeprefix("Value error, "), 600)
    return f"{dotted}: {message} (found {_short(error['input'])})" if dotted else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shown(text: str, length: int = 200) -> str:
    """A name for a message: nothing that a terminal would obey, and not endless."""
    plain = text if text.isprintable() else repr(text)[1:-1]
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def _did_you_mean(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:80], allowed, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (allowed: {', '.join(sorted(allowed))})" if allowed else hint


def _locate(root: type[BaseModel], loc: Sequence[Any]) -> tuple[type[BaseModel] | None, str]:
    """The model that holds the last key, and the path as the user wrote it (pydantic adds union tags to it)."""
    annotation: Any = root
    parts: list[str] = []
    holder: type[BaseModel] | None = None
    for item in loc:
        tags = _tags(annotation)
        if item in tags:
            annotation = tags[item]
            continue
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        holder = model
        parts.append(str(item))
        if model is not None:
            annotation = _plain(model.model_fields[item].annotation) if item in model.model_fields else None
        else:
            arguments = typing.get_args(annotation)
            annotation = _plain(arguments[-1]) if arguments else None
    return holder, shown(".".join(parts))


def _plain(annotation: Any) -> Any:
    """Strip Annotated and `| None`."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return _plain(members[0]) if len(members) == 1 else annotation
    return annotation


def _tags(annotation: Any) -> dict[str, type[BaseModel]]:
    """Tag → model of a discriminated union."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return {}
    members = [_plain(member) for member in typing.get_args(annotation)]
    models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    return {
        typing.get_args(model.model_fields["kind"].annotation)[0]: model for model in models if "kind" in model.model_fields
    }
