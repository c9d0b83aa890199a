"""Speed of scoring and decoding against rouge-score and transformers' generate, each ratio within one run."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Figures
from rouge_score.rouge_scorer import RougeScorer

from pipeline.data.examples import EncodedPrompt
from pipeline.evaluation import rouge
from pipeline.evaluation.generate import DecodingProtocol, generate
from pipeline.evaluation.sampling import filter_top_p, sample
from pipeline.models.load import load_model, load_tokenizer

ROWS, SEEDS, NEW_TOKENS, PADDED = 20, (10, 20, 30, 40, 50), 32, 256


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_rouge_against_rouge_score(benchmark: Any, figures: Figures, shared: Path) -> None:
    rows = json.loads((shared / "golden" / "rouge.json").read_text(encoding="utf-8"))["rows"]
    predictions, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def theirs() -> list[float]:
        pairs = zip(predictions, references, strict=True)
        return [100 * scorer.score_multi(texts, text)["rougeL"].fmeasure for text, texts in pairs]

    def ours() -> list[float]:
        return [row.rouge_l for row in rouge.score_rows(predictions, references)]

    def cold() -> list[float]:
        rouge._stem.cache_clear()
        return ours()

    assert ours() == theirs() == cold()
    times = [(seconds(theirs), seconds(cold), seconds(ours)) for _ in range(7)]
    rouge_score, first, again = (statistics.median(column) for column in zip(*times, strict=True))
    figures.add("ROUGE-L", "rows per second over rouge-score", rouge_score / again, "×", (">=", 20))
    figures.add("ROUGE-L", "the same with an empty stem cache (first call of a process)", rouge_score / first, "×")
    benchmark(ours)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_choosing_tokens_for_64_rows_of_49152(benchmark: Any, top_p: float) -> None:
    logits, uniforms = torch.randn(64, 49_152) * 3, torch.rand(64, dtype=torch.float64)
    benchmark(lambda: sample(filter_top_p(logits, top_p), uniforms))


@pytest.mark.timeout(1800)
def test_decoding_against_one_seed_at_a_time(benchmark: Any, figures: Figures, smollm: Path, shared: Path) -> None:
    model, tokenizer = load_model(smollm).eval(), load_tokenizer(smollm)
    lines = (shared / "data" / "self_inst.jsonl").read_text(encoding="utf-8").splitlines()
    encoded = [tuple(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines]
    prompts = [EncodedPrompt(str(row), "", ids, ("",)) for row, ids in enumerate(encoded) if len(ids) <= PADDED][:ROWS]
    protocol = DecodingProtocol(NEW_TOKENS, do_sample=True, no_repeat_ngram_size=6)
    end = tokenizer.eos_token_id

    def theirs(seed: int) -> int:
        ids = torch.full((ROWS, PADDED), end)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            mask[row, -len(prompt.input_ids) :] = 1
        torch.manual_seed(seed)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            no_repeat_ngram_size=6, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        ends = (output[:, PADDED:] == end).int()
        return int((ends.cumsum(dim=1) - ends == 0).sum())

    # The same 20 sequences at a time as transformers, and the same 20 prompts at a time, all seeds from one prefix.
    sizes = {"20 sequences at a time": ROWS, "20 prompts × 5 seeds at a time": ROWS * len(SEEDS)}
    streams = {name: generate(model, tokenizer, prompts, protocol, SEEDS, size) for name, size in sizes.items()}
    tokens, times = dict.fromkeys(["theirs", *sizes], 0), dict.fromkeys(["theirs", *sizes], 0.0)

    def timed(name: str, work: Callable[[], int]) -> None:
        started = time.perf_counter()
        tokens[name] += work()
        times[name] += time.perf_counter() - started

    def ours(name: str) -> int:
        return sum(len(row.token_ids) for row in itertools.islice(streams[name], sizes[name]))

    for seed in SEEDS:  # alternating, so that another load on the machine meets both
        timed("theirs", functools.partial(theirs, seed))
        timed("20 sequences at a time", functools.partial(ours, "20 sequences at a time"))
    timed("20 prompts × 5 seeds at a time", functools.partial(ours, "20 prompts × 5 seeds at a time"))
    rates = {name: tokens[name] / times[name] for name in tokens}
    figures.add(
        "generation", "transformers' generate, one seed at a time, 20 prompts padded to 256", rates["theirs"], "tokens/s"
    )
    for name in sizes:
        goal = (">=", 3.0) if sizes[name] > ROWS else None
        figures.add("generation", f"tokens per second over transformers, {name}", rates[name] / rates["theirs"], "×", goal)
    benchmark.pedantic(lambda: list(generate(model, tokenizer, prompts[:4], protocol, SEEDS, ROWS)), rounds=1)
