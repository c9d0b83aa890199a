"""Headers of weight files, checked against the file's size before any library allocates what they ask for."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from safetensors import SafetensorError, safe_open

from pipeline.errors import ModelError

_GGUF_VERSIONS = (2, 3)
_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_DIMENSIONS = 4  # of a tensor in GGUF
_FETCH = "the file is damaged or no such file; fetch it again"


def check_safetensors(folder: Path) -> None:
    """Check every *.safetensors of a model folder, and that its index names files in the folder only.

    The library compares the header (at most 100 MB of JSON) with the file: every tensor inside it, none overlapping.

    Raises:
        ModelError: a header does not fit its file, or an index leads out of the folder.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a safetensors file ({_line(error)}); {_FETCH}") from None
    for file in sorted(folder.glob("*.safetensors.index.json")):
        for name in _indexed(file):
            if PurePosixPath(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{file}: names {name!r}, which is no file beside it; {_FETCH}")


def check_gguf(file: Path) -> None:
    """Check a GGUF file's header: version, settings and tensors, all of which must lie inside the file.

    Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        ModelError: it is no GGUF file of version 2 or 3, or its header does not fit it.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: not a usable GGUF file ({_line(error)}); {_FETCH}") from None


class _Header:
    """Reads a GGUF header from its beginning; struct refuses to read past the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._alignment = content, 0, 32

    def check(self) -> None:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in _GGUF_VERSIONS:
            raise ValueError(f"version {version}, but only 2 and 3 are read")
        tensors, settings = self._number("Q"), self._number("Q")
        for _ in range(settings):
            key = self._text()
            value = self._value(self._kind())
            if key == b"general.alignment":
                self._set_alignment(value)
        ends = [self._tensor() for _ in range(tensors)]
        data = -(-self._at // self._alignment) * self._alignment
        for name, offset, size in ends:
            if offset % self._alignment or data + offset + size > len(self._content):
                raise ValueError(f"the data of tensor {name!r} would be outside the file")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._content, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _text(self) -> bytes:
        length = self._number("Q")
        self._skip(length)
        return self._content[self._at - length : self._at]

    def _skip(self, length: int) -> None:
        if length > len(self._content) - self._at:
            raise ValueError(f"{length} bytes at {self._at}, but the file ends at {len(self._content)}")
        self._at += length

    def _kind(self) -> GGUFValueType:
        return GGUFValueType(self._number("I"))

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_FORMATS[kind])
        inner, count = self._kind(), self._number("Q")
        if inner == _ARRAY:
            raise ValueError("a setting is an array of arrays")
        if inner == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            self._skip(count * struct.calcsize("<" + _FORMATS[inner]))
        return None

    def _set_alignment(self, value: Any) -> None:
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise ValueError(f"general.alignment is {value!r}, which is no power of 2")
        self._alignment = value

    def _tensor(self) -> tuple[str, int, int]:
        """Name, offset in the data and bytes of a tensor."""
        name = self._text().decode("utf-8")
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("Q")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
        return name, self._number("Q"), -(-elements // block) * size


def _indexed(file: Path) -> Iterator[str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        yield from (str(name) for name in dict.fromkeys(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: not an index of safetensors files ({_line(error)}); {_FETCH}") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
