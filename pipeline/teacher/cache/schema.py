"""What a cache holds: its key, the layout of a shard, the coding of states, and the ledger of finished shards."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.artifacts import UNSEALED, file_digest, is_sealed, seal, write_text_atomically
from pipeline.errors import ArtifactError, CacheMismatchError

LEDGER = "ledger.json"
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines a cache's content; opening it under another key is an error.

    Attributes:
        teacher: digest of the teacher's weights (its head's among them) and configuration.
        tokenizer: digest of the tokenizer.
        template: id of the prompt template.
        dataset: fingerprint of the tokenised rows.
        layers: cached layers, sorted; a cache with more than those asked for serves as well.
        dtype: storage type, a key of `STORAGE`.
        max_tokens: longest row that the dataset may hold, in tokens.
        final_layer_normed: the convention of `TeacherSignal`: L_T after the final norm, all other layers raw.
    """

    teacher: str
    tokenizer: str
    template: str
    dataset: str
    layers: tuple[int, ...]
    dtype: str
    max_tokens: int
    final_layer_normed: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE:
            raise ValueError(f"cache dtype {self.dtype!r}; allowed: {', '.join(STORAGE)}")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))


@dataclass(frozen=True)
class Storage:
    """How one dtype lies on disk.

    Attributes:
        arrow: element type of the column.
        words: NumPy type of the same bytes.
        torch: what the bytes mean; bfloat16 has no Arrow or NumPy type, so its 16-bit words are stored.
        scaled: one float32 factor per token accompanies the values.
    """

    arrow: pa.DataType
    words: type[np.generic]
    torch: torch.dtype
    scaled: bool = False

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one stored element."""
        return np.dtype(self.words).itemsize


STORAGE = {
    "float32": Storage(pa.float32(), np.float32, torch.float32),
    "bfloat16": Storage(pa.uint16(), np.uint16, torch.bfloat16),
    "float16": Storage(pa.float16(), np.float16, torch.float16),
    "int8": Storage(pa.int8(), np.int8, torch.int8, scaled=True),
}


def check_key(found: CacheKey, expected: CacheKey, where: Path, *, more_layers: bool) -> None:
    """Compare a cache's key with the expected one.

    Args:
        found: the cache's.
        expected: what is asked for.
        where: the cache's folder.
        more_layers: whether the cache may hold further layers.

    Raises:
        CacheMismatchError: one line for each difference.
    """
    problems = []
    for field in fields(CacheKey):
        held, wanted = getattr(found, field.name), getattr(expected, field.name)
        serves = field.name == "layers" and more_layers and set(wanted) <= set(held)
        if held != wanted and not serves:
            problems.append(f"{field.name}: cache has {held}, expected {wanted}")
    if problems:
        raise CacheMismatchError(
            "\n".join([f"{where}: this teacher cache was made for something else", *(f"  - {line}" for line in problems)])
            + "\nuse a cache captured under these settings, or capture a new one into another folder"
        )


def layer_column(layer: int) -> str:
    """Name of the column with a layer's states."""
    return f"layer_{layer}"


def scale_column(layer: int) -> str:
    """Name of the column with a layer's per-token factors."""
    return f"layer_{layer}_scale"


def shard_schema(layers: Sequence[int], width: int, dtype: str) -> pa.Schema:
    """Columns of a shard, one row per example: `id`, `n` (response tokens), and per layer a list of n vectors of `width`."""
    storage = STORAGE[dtype]
    columns = [pa.field("id", pa.string(), nullable=False), pa.field("n", pa.int32(), nullable=False)]
    for layer in layers:
        columns.append(pa.field(layer_column(layer), pa.large_list(pa.list_(storage.arrow, width)), nullable=False))
        if storage.scaled:
            columns.append(pa.field(scale_column(layer), pa.large_list(pa.float32()), nullable=False))
    return pa.schema(columns)


def encode(states: Tensor, dtype: str) -> tuple[NDArray[np.generic], NDArray[np.float32] | None]:
    """States [N, d] as stored words [N, d] and, for int8, factors [N] (symmetric, max|h| / 127 of each token).

    Raises:
        OverflowError: a state is not finite, or beyond the range of `dtype`; carries the largest magnitude.
    """
    states = states.detach().cpu()
    storage = STORAGE[dtype]
    if not storage.scaled:
        stored = states.to(storage.torch).contiguous()
        if not torch.isfinite(stored).all():
            raise OverflowError(f"{float(states.abs().max()):.3g}")
        words = stored.view(torch.uint16) if storage.torch == torch.bfloat16 else stored
        return words.numpy(), None
    exact = states.float()
    if not torch.isfinite(exact).all():
        raise OverflowError(f"{float(exact.abs().max()):.3g}")
    scale = exact.abs().amax(dim=1) / 127 if exact.numel() else exact.new_zeros(len(exact))
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (exact / divisor[:, None]).round_().to(torch.int8).numpy(), scale.numpy()


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """States [N, d] in float32 of stored values and factors."""
    values = stored.float()
    return values if scale is None else values * scale[:, None]


@dataclass(frozen=True)
class ShardFacts:
    """One finished shard.

    Attributes:
        file: its name inside the cache.
        rows: examples.
        tokens: response tokens.
        bytes: file size.
        sha256: checksum, hex.
    """

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Ledger:
    """What is finished in a cache folder.

    Attributes:
        key: what the cache pins.
        num_layers: L_T of the teacher.
        width: d_T of the teacher.
        part: (i, n): the folder holds the examples of part i of n; (0, 1) is a whole cache.
        shards: finished shards.
        finished: every example is in a shard.
        layout: version of the layout.
    """

    key: CacheKey
    num_layers: int
    width: int
    part: tuple[int, int]
    shards: tuple[ShardFacts, ...] = ()
    finished: bool = False
    layout: int = LAYOUT_VERSION


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Replace the folder's ledger atomically."""
    content = json.dumps({**asdict(ledger), "sealed_by": UNSEALED}, indent=1)
    write_text_atomically(folder / LEDGER, seal(content.encode()).decode())


def read_ledger(folder: Path) -> Ledger | None:
    """The folder's ledger, None if there is none.

    Raises:
        ArtifactError: it is damaged or of another layout.
    """
    path = folder / LEDGER
    try:
        content = path.read_bytes()
        raw = json.loads(content)
        # Ledgers of earlier versions have no seal. A damaged name of the field is none that a Ledger has.
        if raw.pop("sealed_by", None) is not None and not is_sealed(content):
            raise ValueError("its checksum differs")
        layout = raw["layout"]
        if layout == LAYOUT_VERSION:
            key = CacheKey(**{**raw["key"], "layers": tuple(raw["key"]["layers"])})
            shards = tuple(ShardFacts(**facts) for facts in raw["shards"])
            first, parts = raw["part"]
            return Ledger(**{**raw, "key": key, "shards": shards, "part": (first, parts)})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a cache ledger ({error}); remove {folder} and capture again") from None
    raise ArtifactError(
        f"{path}: layout version {layout}, this program reads {LAYOUT_VERSION}; remove {folder} and capture again"
    )


def verify_shard(folder: Path, facts: ShardFacts, fix: str) -> None:
    """Compare a shard with its ledger entry; the checksum is computed once per process.

    Raises:
        ArtifactError: it is missing, truncated or altered; the message names the file and ends with `fix`.
    """
    path = folder / facts.file
    if not path.is_file():
        raise ArtifactError(f"{path}: the shard is missing; {fix}")
    status = path.stat()
    if status.st_size != facts.bytes:
        raise ArtifactError(f"{path}: the shard has {status.st_size} bytes, its ledger says {facts.bytes}; {fix}")
    if _digest(path.resolve(), status.st_size, status.st_mtime_ns) != facts.sha256:
        raise ArtifactError(f"{path}: the shard's checksum differs from its ledger's; {fix}")


@functools.cache
def _digest(path: Path, size: int, modified_ns: int) -> str:
    del size, modified_ns  # part of the memory's key: a file that changes is read again
    return file_digest(path)
