"""Scores of one model on one benchmark for every decoding seed; killed, it goes on from the batches already decoded."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import UNSEALED, canonical_json, is_sealed, seal, sync, text_digest
from pipeline.data.examples import EncodedPrompt
from pipeline.errors import ArtifactError
from pipeline.evaluation.generate import (
    Decoder,
    DecodingProtocol,
    Generation,
    check_lengths,
    context_length,
    decode,
    plan_batches,
    used_seeds,
)
from pipeline.evaluation.rouge import score_rows

VERSION = 1
"""Raise it when the same model, prompts and protocol would give other generations or scores."""
_KEY, _SECONDS, _SEALED = b"evaluation_key", b"decoding_seconds", b"sealed_by"
_SAMPLED_WEIGHTS = 64
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("prediction", pa.string()),
        ("references", pa.list_(pa.string())),
        ("category", pa.string()),
        ("rouge_l", pa.float64()),
        ("exact_match", pa.float64()),
        ("n_tokens", pa.int64()),
        ("finished", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class SeedScores:
    """Mean scores of one decoding seed over the rows, 0–100."""

    seed: int
    rouge_l: float
    exact_match: float


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) over decoding seeds; no deviation for a single seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of a benchmark.

    Attributes:
        per_seed: in the order of the decoding seeds.
        rouge_l: over decoding seeds, 0–100.
        exact_match: over decoding seeds, 0–100.
        rows: prompts.
        mean_tokens: generated tokens per response, the end token included.
        share_cut: share of the responses that were cut at their limit, 0–1.
        tokens_per_second: generated tokens per second of decoding, over all interrupted runs together.
    """

    per_seed: tuple[SeedScores, ...]
    rouge_l: Spread
    exact_match: Spread
    rows: int
    mean_tokens: float
    share_cut: float
    tokens_per_second: float


class BatchDecoder(Protocol):
    """What decodes a batch: `pipeline.evaluation.generate.Decoder`, or another engine's in its shape."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Gives the text of a response."""
        ...

    @property
    def protocol(self) -> DecodingProtocol:
        """How to decode."""
        ...

    @property
    def seeds(self) -> Sequence[int]:
        """Decoding seeds."""
        ...

    @property
    def max_length(self) -> int | None:
        """Most tokens of prompt and response together."""
        ...

    def decode(self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], None] | None = None) -> list[Generation]:
        """The responses to one batch of prompts, in the order prompts × seeds."""
        ...


def evaluate_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    protocol: DecodingProtocol,
    seeds: Sequence[int],
    batch_size: int,
    out: Path,
    progress: Callable[[int], None] | None = None,
    max_length: int | None = None,
) -> BenchmarkScores:
    """Decode, score and write the raw generations to `out` (Parquet, one row per prompt × seed, in that order).

    Every batch is first written into `OUT.parts`, which is removed at the end. Parts and a finished `out` are reused if
    they were made from the same weights, prompts, protocol and seeds; anything else there is replaced.

    Args:
        model: see `pipeline.evaluation.generate.generate`, as for the arguments without an entry here.
        tokenizer: decodes the responses, and gives the end and padding tokens.
        prompts: the benchmark's rows, at least one, with distinct ids and at least one reference each.
        protocol: how to decode.
        seeds: decoding seeds.
        batch_size: sequences decoded together.
        out: the Parquet file.
        progress: called with the number of responses that are newly done; reused ones count at once.
        max_length: most tokens of prompt and response together.

    Raises:
        ArtifactError: a part that cannot be read.
        ConfigError, DataError, ModelError: see `generate`.
        ValueError: no prompts, a prompt without references, and the cases of `generate`.
    """
    _check(prompts)
    check_lengths(context_length(model.config), prompts, protocol, max_length)
    decoder = Decoder(model, tokenizer, protocol, seeds, batch_size, max_length)
    return evaluate_with(decoder, _weights_digest(model), prompts, batch_size, out, progress)


def evaluate_with(
    decoder: BatchDecoder,
    model: str,
    prompts: Sequence[EncodedPrompt],
    batch_size: int,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> BenchmarkScores:
    """As `evaluate_benchmark`, with a decoder that is ready and prompts that `check_lengths` has passed.

    Args:
        decoder: answers batches of prompts.
        model: identifies model and engine: parts made under another are not reused.
        prompts: the benchmark's rows.
        batch_size: sequences handed to the decoder at a time.
        out: the Parquet file.
        progress: called with the number of responses that are newly done.

    Raises:
        ArtifactError: a part that cannot be read.
        ModelError: see the decoder.
        ValueError: no prompts, or a prompt without references.
    """
    _check(prompts)
    protocol, seeds = decoder.protocol, decoder.seeds
    batches = plan_batches(prompts, protocol, seeds, batch_size)
    conditions = _conditions(decoder, model)
    key = _key(conditions, prompts)
    finished = _finished(out, key)
    if finished is not None:
        _report(progress, len(finished))
        return _summary(finished)
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    tables = [_part(parts, decoder, batch, _key(conditions, batch), progress) for batch in batches]
    table = _in_order(tables, prompts, used_seeds(protocol, seeds)).replace_schema_metadata(
        {_KEY: key, _SECONDS: repr(sum(map(_seconds, tables)))}
    )
    _write(table, out, parts)
    shutil.rmtree(parts)
    return _summary(table)


def _check(prompts: Sequence[EncodedPrompt]) -> None:
    if not prompts:
        raise ValueError("no prompts to evaluate; give at least one")
    for prompt in prompts:
        if not prompt.references:
            raise ValueError(f"prompt {prompt.id} has no references; it cannot be scored")


def _part(
    parts: Path, decoder: BatchDecoder, batch: Sequence[EncodedPrompt], key: str, progress: Callable[[int], None] | None
) -> pa.Table:
    file = parts / f"{key}.parquet"
    if file.exists():
        table = _read(file)
        _report(progress, len(table))
        return table
    started = time.perf_counter()
    generations = decoder.decode(batch, progress)
    seconds = time.perf_counter() - started
    by_id = {prompt.id: prompt for prompt in batch}
    owners = [by_id[generation.id] for generation in generations]
    predictions = [decode(decoder.tokenizer, generation.token_ids) for generation in generations]
    scores = score_rows(predictions, [owner.references for owner in owners])
    columns = {
        "id": [owner.id for owner in owners],
        "seed": [generation.seed for generation in generations],
        "prompt": [owner.prompt for owner in owners],
        "prediction": predictions,
        "references": [list(owner.references) for owner in owners],
        "category": [owner.category for owner in owners],
        "rouge_l": [row.rouge_l for row in scores],
        "exact_match": [row.exact_match for row in scores],
        "n_tokens": [len(generation.token_ids) for generation in generations],
        "finished": [generation.finished for generation in generations],
    }
    table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({_SECONDS: repr(seconds)})
    _write(table, file, parts)
    return table


def _in_order(tables: Iterable[pa.Table], prompts: Sequence[EncodedPrompt], seeds: Sequence[int]) -> pa.Table:
    table = pa.concat_tables(part.replace_schema_metadata(None) for part in tables)
    found = {pair: row for row, pair in enumerate(zip(table["id"].to_pylist(), table["seed"].to_pylist(), strict=True))}
    return table.take([found[prompt.id, seed] for prompt in prompts for seed in seeds])


def _summary(table: pa.Table) -> BenchmarkScores:
    seeds = list(dict.fromkeys(table["seed"].to_pylist()))
    count = len(seeds)
    # Rows run prompts × seeds, so every count-th row belongs to the same seed.
    rouge_l, exact_match = table["rouge_l"].to_pylist(), table["exact_match"].to_pylist()
    per_seed = tuple(
        SeedScores(seed, statistics.fmean(rouge_l[index::count]), statistics.fmean(exact_match[index::count]))
        for index, seed in enumerate(seeds)
    )
    tokens = table["n_tokens"].to_pylist()
    return BenchmarkScores(
        per_seed=per_seed,
        rouge_l=_spread([scores.rouge_l for scores in per_seed]),
        exact_match=_spread([scores.exact_match for scores in per_seed]),
        rows=len(table) // count,
        mean_tokens=statistics.fmean(tokens),
        share_cut=1 - statistics.fmean(table["finished"].to_pylist()),
        tokens_per_second=sum(tokens) / _seconds(table),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _conditions(decoder: BatchDecoder, model: str) -> str:
    """What a generation depends on besides its prompt; the batch size is no part of it."""
    return canonical_json(
        {
            "version": VERSION,
            "weights": model,
            "protocol": asdict(decoder.protocol),
            "seeds": list(used_seeds(decoder.protocol, decoder.seeds)),
            "end_token": decoder.tokenizer.eos_token_id,
            "max_length": decoder.max_length,
        }
    )


def _weights_digest(model: PreTrainedModel) -> str:
    # Training moves nearly every weight, so a few of each tensor tell two checkpoints apart at no cost.
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, weights in model.named_parameters():
        flat = weights.detach().flatten()
        step = max(1, len(flat) // _SAMPLED_WEIGHTS)
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        digest.update(flat[::step].to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()


def _key(conditions: str, prompts: Sequence[EncodedPrompt]) -> str:
    return text_digest(canonical_json([conditions, *(asdict(prompt) for prompt in prompts)]))[:32]


def _finished(out: Path, key: str) -> pa.Table | None:
    if not out.exists():
        return None
    table = _read(out)
    return table if (table.schema.metadata or {}).get(_KEY) == key.encode() else None


def _read(file: Path) -> pa.Table:
    try:
        content = file.read_bytes()
        # Parquet's own checksums, which are optional, cover pages but not the metadata.
        if not is_sealed(content):
            raise pa.ArrowInvalid("its checksum differs")
        return pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{file}: not a readable Parquet file ({error}); remove it and run again") from None


def _write(table: pa.Table, file: Path, scratch: Path) -> None:
    # A reader sees a whole file or none; what a kill leaves behind lies in `scratch`, which goes at the end.
    temporary = scratch / f".{file.name}.{os.getpid()}.tmp"
    metadata = {**(table.schema.metadata or {}), _SEALED: UNSEALED}
    pq.write_table(table.replace_schema_metadata(metadata), temporary)
    with temporary.open("rb+") as stream:
        content = seal(stream.read())
        stream.seek(0)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    sync(file.parent)


def _seconds(table: pa.Table) -> float:
    return float((table.schema.metadata or {})[_SECONDS])


def _report(progress: Callable[[int], None] | None, count: int) -> None:
    if progress is not None:
        progress(count)
