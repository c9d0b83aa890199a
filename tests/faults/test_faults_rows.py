"""Many rows: what preparing them and opening them for training takes does not grow with them, or hardly."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
from faults_run import BUDGET, CONTEXT
from faults_setup import ALL, Tally

from pipeline.data import tokenize
from pipeline.data.examples import EncodedExample, EncodedPrompt, Example
from pipeline.data.tokenize import read_encoded
from pipeline.models.load import load_tokenizer
from pipeline.plan import Plan, check_inputs
from pipeline.stages import prepare
from pipeline.stages.prepare import TRAIN
from pipeline.training.feed import Order

LIMIT_MIB = 1024
MORE = 4_500
MOST_HELD = 2_400
"""Two batches of the file, of which one is being collected, and what is on its way to it."""


def write_many(path: Path, count: int) -> None:
    """Rows of varied length in a few scripts, the same ones on every call."""
    draw = random.Random(0)
    words = [*tiny.WORDS, "naïve", "東京", "🙂", "1234", "שלום"]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    with path.open("w", encoding="utf-8") as stream:
        for index in range(count):
            row = {"instruction": f"{index}: {text(2, 8)}", "input": text(3, 20) if index % 2 else "", "output": text(1, 40)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def planned(folder: Path, run_dir: Path, count: int) -> Plan:
    """An experiment with that many rows, of which dev rows and a benchmark are held out; another benchmark is a sample."""
    rows = folder / "many.jsonl"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_many(rows, count)
    return stages.planned(
        folder, run_dir=run_dir, methods={"sft": None}, train=BUDGET,
        data={
            "train": {"path": str(rows)}, "dev": {"kind": "held_out", "part": "dev"},
            "held_out": {"seed": 1, "dev": 50, "test": 50}, "max_prompt_tokens": 400, "max_tokens": 512,
        },
        benchmarks={
            "held": {"source": {"kind": "held_out", "part": "test"}},
            "sampled": {"source": {"path": str(rows)}, "filter": {"min_reference_words": 5}, "sample": {"rows": 40}},
        },
    )  # fmt: skip


def prepared(plan: Plan) -> dict[str, str]:
    """Look at every row and prepare them, as a run does; the digest of every file."""
    check_inputs(plan)
    made = [prepare.run(plan.data), *map(prepare.run_benchmark, plan.benchmarks)]
    return {f"{one.fingerprint}/{name}": facts["sha256"] for one in made for name, facts in one.manifest.files.items()}


def alive() -> int:
    """Rows that this process holds as objects."""
    return sum(type(one) in (Example, EncodedExample, EncodedPrompt) for one in gc.get_objects())


def test_preparing_holds_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    encode, before = tokenize._token_ids, alive()
    found: list[int] = []

    def watched(*given: Any) -> list[list[int]]:
        found.append(alive() - before)
        return encode(*given)

    monkeypatch.setattr(tokenize, "_token_ids", watched)
    prepared(planned(tmp_path / "rows", tmp_path / "runs", MORE))
    assert len(found) > MORE // 256
    tally("many rows", 0 < max(found) <= MOST_HELD, f"{max(found)} of {MORE} rows at a time")


def _child(folder: Path, run_dir: Path, count: int, threads: int, told: Path) -> None:
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    plan = planned(folder, run_dir, count)
    load_tokenizer(plan.data.tokenizer.folder())(["warm up"] * 64)
    before = _most_mib()
    digests = prepared(plan)
    most, own = _most_mib() - before, _own_mib()
    rows = read_encoded(plan.data.place.existing().path / TRAIN)  # type: ignore[union-attr]
    for _, batch in islice(Order(8, 8, 1, 10**6).steps(rows.lengths, 0), 2000):
        assert all(rows[index].input_ids for index in batch)
    told.write_text(json.dumps({"digests": digests, "MiB": [most, _own_mib() - own], "rows": len(rows)}))


def _most_mib() -> float:
    """The most that the process ever had, pages of files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _own_mib() -> float:
    """What it has now. Pages of the mapped file do not count: the kernel takes them back when it needs them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def in_a_process(folder: Path, run_dir: Path, count: int, threads: int) -> dict[str, Any]:
    """What a process that prepares the rows, and reads some as training does, tells."""
    told = run_dir.with_suffix(".json")
    process = CONTEXT.Process(target=_child, args=(folder, run_dir, count, threads, told))
    process.start()
    process.join()
    assert process.exitcode == 0
    found: dict[str, Any] = json.loads(told.read_text())
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [MORE, *([1_000_000] if ALL else [])])
def test_the_same_files_within_a_gibibyte_whatever_the_threads(count: int, tmp_path: Path, tally: Tally) -> None:
    one, four = (in_a_process(tmp_path / "rows", tmp_path / f"runs-{threads}", count, threads) for threads in (1, 4))
    shutil.rmtree(tmp_path)
    kept = one["rows"] > 0.9 * count and one["digests"] == four["digests"]
    within = max(*one["MiB"], *four["MiB"]) < LIMIT_MIB
    tally("a million rows" if count > MORE else "many rows", kept and within, f"{one}\n{four}")
