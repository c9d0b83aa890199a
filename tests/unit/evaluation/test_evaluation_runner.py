from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.data.examples import EncodedPrompt
from pipeline.errors import ArtifactError, ConfigError
from pipeline.evaluation import runner
from pipeline.evaluation.generate import DecodingProtocol, decode, generate
from pipeline.evaluation.rouge import score
from pipeline.evaluation.runner import BenchmarkScores, evaluate_benchmark

PROTOCOL = DecodingProtocol(max_new_tokens=12, do_sample=True)
SEEDS = [30, 10, 20]
BATCH = 6  # two prompts × three seeds


@pytest.fixture
def tiny(tiny_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return tiny_models["gpt2"]


@pytest.fixture
def forwards(tiny: PreTrainedModel) -> Iterator[list[int]]:
    """Grows by one entry per forward pass."""
    seen: list[int] = []
    handle = tiny.register_forward_pre_hook(lambda module, args: seen.append(1))
    yield seen
    handle.remove()


def without_speed(scores: BenchmarkScores) -> BenchmarkScores:
    return replace(scores, tokens_per_second=0.0)


class Killed(BaseException):
    pass


def kill_after(responses: int) -> Any:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done > responses:
            raise Killed

    return progress


def test_scores_are_those_of_the_generations(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    scores = evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, tmp_path / "out.parquet")
    found = {(row.id, row.seed): row for row in generate(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH)}
    references = [prompt.references for prompt in prompts]
    per_seed = [
        score([decode(tokenizer, found[prompt.id, seed].token_ids) for prompt in prompts], references) for seed in SEEDS
    ]
    assert [row.seed for row in scores.per_seed] == SEEDS
    assert [row.rouge_l for row in scores.per_seed] == pytest.approx([row.rouge_l for row in per_seed], abs=1e-9)
    assert [row.exact_match for row in scores.per_seed] == pytest.approx([row.exact_match for row in per_seed], abs=1e-9)
    assert scores.rouge_l.mean == pytest.approx(statistics.fmean(row.rouge_l for row in per_seed), abs=1e-9)
    assert scores.rouge_l.std == pytest.approx(statistics.stdev(row.rouge_l for row in per_seed), abs=1e-9)
    assert scores.rouge_l.std > 0
    assert scores.rows == len(prompts)
    assert scores.mean_tokens == statistics.fmean(len(row.token_ids) for row in found.values())
    assert scores.share_cut == pytest.approx(statistics.fmean(not row.finished for row in found.values()), abs=1e-12)
    assert 0 < scores.share_cut < 1
    assert scores.tokens_per_second > 0


def test_scores_can_be_stored_as_json(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    scores = evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, tmp_path / "out.parquet")
    stored = json.loads(json.dumps(asdict(scores), allow_nan=False))
    assert [row["rouge_l"] for row in stored["per_seed"]] == [row.rouge_l for row in scores.per_seed]


@pytest.mark.parametrize("protocol", [replace(PROTOCOL, do_sample=False), PROTOCOL])
def test_one_seed_has_no_deviation_and_greedy_uses_the_first(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path, protocol: DecodingProtocol
) -> None:
    seeds = [30] if protocol.do_sample else SEEDS
    scores = evaluate_benchmark(tiny, tokenizer, prompts, protocol, seeds, BATCH, tmp_path / "out.parquet")
    assert [row.seed for row in scores.per_seed] == [30]
    assert scores.rouge_l.std is None
    assert scores.rows == len(prompts)


def test_raw_generations_are_in_the_order_prompts_by_seeds(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, out)
    table = pq.read_table(out)
    assert table.schema.names == [
        "id", "seed", "prompt", "prediction", "references", "category", "rouge_l", "exact_match", "n_tokens", "finished",
    ]  # fmt: skip
    assert table.schema.field("references").type == pa.list_(pa.string())
    rows = table.to_pylist()
    assert [(row["id"], row["seed"]) for row in rows] == [(prompt.id, seed) for prompt in prompts for seed in SEEDS]
    found = {(row.id, row.seed): row for row in generate(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH)}
    for row, prompt in zip(rows[::3], prompts, strict=True):
        generation = found[prompt.id, row["seed"]]
        assert row["prompt"] == prompt.prompt
        assert row["category"] == prompt.category
        assert tuple(row["references"]) == prompt.references
        assert row["prediction"] == decode(tokenizer, generation.token_ids)
        assert row["n_tokens"] == len(generation.token_ids)
        assert row["finished"] == generation.finished
        assert row["rouge_l"] == score([row["prediction"]], [prompt.references]).rouge_l


def test_a_killed_evaluation_goes_on_and_gives_the_same(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path, forwards: list[int]
) -> None:
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    expected = evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, whole)
    needed = len(forwards)
    forwards.clear()
    with pytest.raises(Killed):
        evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, killed, kill_after(20))
    assert not killed.exists()
    assert len(list(killed.with_name("killed.parquet.parts").iterdir())) == 3
    forwards.clear()
    counts: list[int] = []
    scores = evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, killed, counts.append)
    assert without_speed(scores) == without_speed(expected)
    assert pq.read_table(killed).equals(pq.read_table(whole))
    assert sum(counts) == len(prompts) * len(SEEDS)
    assert 0 < len(forwards) < needed
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["killed.parquet", "whole.parquet"]


def test_a_finished_evaluation_is_reused(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path, forwards: list[int]
) -> None:
    out = tmp_path / "out.parquet"
    expected = evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, out)
    forwards.clear()
    counts: list[int] = []
    assert evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, 100, out, counts.append) == expected
    assert sum(counts) == len(prompts) * len(SEEDS)
    assert not forwards


@pytest.mark.parametrize("change", ["weights", "protocol", "seeds", "references", "max_length"])
def test_results_made_under_other_conditions_are_not_reused(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path, forwards: list[int], change: str
) -> None:
    out = tmp_path / "out.parquet"
    arguments: dict[str, Any] = {"prompts": prompts, "protocol": PROTOCOL, "seeds": SEEDS, "max_length": None}
    first = evaluate_benchmark(model=tiny, tokenizer=tokenizer, batch_size=BATCH, out=out, **arguments)
    forwards.clear()
    before = {name: weights.clone() for name, weights in tiny.state_dict().items()}
    if change == "weights":
        with torch.no_grad():
            for weights in tiny.parameters():
                weights.mul_(1.5)
    elif change == "protocol":
        arguments["protocol"] = replace(PROTOCOL, temperature=2.0)
    elif change == "seeds":
        arguments["seeds"] = [30, 10, 40]
    elif change == "references":
        arguments["prompts"] = [replace(prompt, references=("w3",)) for prompt in prompts]
    else:
        arguments["max_length"] = 22
    try:
        second = evaluate_benchmark(model=tiny, tokenizer=tokenizer, batch_size=BATCH, out=out, **arguments)
    finally:
        tiny.load_state_dict(before)
    assert forwards
    assert without_speed(second) != without_speed(first)


def test_parts_of_other_weights_are_not_mixed_in(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    before = {name: weights.clone() for name, weights in tiny.state_dict().items()}
    with torch.no_grad():
        for weights in tiny.parameters():
            weights.mul_(1.5)
    try:
        with pytest.raises(Killed):
            evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, out, kill_after(20))
    finally:
        tiny.load_state_dict(before)
    evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, out)
    evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, tmp_path / "fresh.parquet")
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "fresh.parquet"))
    assert not out.with_name("out.parquet.parts").exists()


def test_a_failed_write_leaves_no_half_file(
    tiny: PreTrainedModel,
    tokenizer: Any,
    prompts: list[EncodedPrompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = pq.write_table

    def broken(table: pa.Table, where: Path) -> None:
        real(table, where)
        raise OSError("no space left on device")

    monkeypatch.setattr(runner.pq, "write_table", broken)
    with pytest.raises(OSError, match="no space left"):
        evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, tmp_path / "out.parquet")
    assert not list(tmp_path.rglob("*.parquet"))
    monkeypatch.undo()
    evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_damaged_part_is_an_error_with_a_way_out(
    tiny: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(Killed):
        evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, out, kill_after(10))
    part = next(out.with_name("out.parquet.parts").iterdir())
    part.write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="not a readable Parquet file.*remove it"):
        evaluate_benchmark(tiny, tokenizer, prompts, PROTOCOL, SEEDS, BATCH, out)


def test_wrong_input_is_refused_before_anything_is_written(tiny: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    long = EncodedPrompt("long", "", tuple(range(59)), ("a",))
    with pytest.raises(ConfigError, match="the model has 64"):
        evaluate_benchmark(tiny, tokenizer, [long], PROTOCOL, SEEDS, BATCH, out)
    with pytest.raises(ValueError, match="no prompts"):
        evaluate_benchmark(tiny, tokenizer, [], PROTOCOL, SEEDS, BATCH, out)
    unanswered = EncodedPrompt("unanswered", "", (1, 2), ())
    with pytest.raises(ValueError, match="prompt unanswered has no references"):
        evaluate_benchmark(tiny, tokenizer, [unanswered], PROTOCOL, SEEDS, BATCH, out)
    assert not list(tmp_path.iterdir())
