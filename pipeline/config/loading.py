"""YAML with `include`, --set overrides, and every problem in one message."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.experiment import Experiment
from pipeline.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, apply overrides and validate.

    Args:
        path: YAML file. `include: [other.yaml]` merges other files first (paths relative to this file).
        overrides: `dotted.path=value`, the value in YAML; `X.path=…` turns the data source X into a local one.

    Raises:
        ConfigError: anything is wrong; all problems at once.
    """
    return validate_experiment(apply_overrides(read_yaml(path), overrides), str(path))


def validate_experiment(raw: Mapping[str, Any], source: str) -> Experiment:
    """Build the frozen model from plain data.

    Raises:
        ConfigError: one line per problem: dotted path, what is wrong, what is allowed.
    """
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_problem(item) for item in error.errors()], source) from None


def read_yaml(path: Path, _including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping with its includes merged: this file's values win over included ones, later includes over earlier.

    Raises:
        ConfigError: not readable, not YAML, not a mapping, too large, or an include that includes itself.
    """
    path = path.resolve()
    if path in _including:
        raise ConfigError(f"include: {path.name} includes itself through {' → '.join(p.name for p in _including)}", str(path))
    own = _parse(path)
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(item, str) for item in includes):
        raise ConfigError(f"include: {includes!r} must be a list of file names", str(path))
    merged: dict[str, Any] = {}
    for item in includes:
        merged = _merge(merged, read_yaml(path.parent / item, (*_including, path)))
    return _merge(merged, own)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `dotted.path=value` settings; local paths first, so that row limits given beside them are kept.

    Raises:
        ConfigError: a setting without "=", a value that is not YAML, or a path through something that is no mapping.
    """
    parsed = [_parse_override(text) for text in overrides]
    for keys, value in sorted(parsed, key=lambda item: item[0][-1] != "path"):
        raw = _set(raw, keys, value)
    return raw


def _parse(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{size} bytes, but an experiment file has at most {MAX_BYTES}", str(path))
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); give the path of a YAML file", str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", str(path)) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", str(path)) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"must be a mapping of names to values, found {type(value).__name__}", str(path))
    _check_depth(value, path)
    return value


def _check_depth(value: Any, path: Path, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested deeper than {MAX_DEPTH} levels", str(path))
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_depth(child, path, depth + 1)


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


def _parse_override(text: str) -> tuple[list[str], Any]:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}: write it as dotted.path=value")
    try:
        return keys, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML ({' '.join(str(error).split())})") from None


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    head, *rest = keys
    if not rest:
        if head == "path" and raw.get("kind", "local") != "local":
            return {"kind": "local", "path": value}
        return {**raw, head: value}
    child = raw.get(head)
    if child is not None and not isinstance(child, dict):
        raise ConfigError(f"--set {'.'.join(keys)}: {head} is {child!r}, which has no keys")
    return {**raw, head: _set(child or {}, rest, value)}


def _problem(error: Any) -> str:
    model, dotted = _locate(error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = list(model.model_fields) if model else []
        return f"{dotted}: unknown key{_did_you_mean(str(error['loc'][-1]), allowed)}"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        allowed = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        return f"{dotted}.kind: {context['tag']!r} is not known{_did_you_mean(context['tag'], allowed)}"
    if error["type"] == "union_tag_not_found":
        return f"{dotted}: needs a `kind`"
    if error["type"] == "missing":
        return f"{dotted}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not dotted:
        return message
    value = repr(error["input"])
    return f"{dotted}: {message} (found {value if len(value) <= 80 else value[:77] + '...'})"


def _did_you_mean(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (allowed: {', '.join(sorted(allowed))})" if allowed else hint


def _locate(loc: Sequence[Any]) -> tuple[type[BaseModel] | None, str]:
    """The model that holds the last key, and the path as the user wrote it (pydantic adds union tags to it)."""
    annotation: Any = Experiment
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
    return holder, ".".join(parts)


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
