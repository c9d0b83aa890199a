"""A benchmark is one YAML file: rows, prompt, decoding and seeds, with a hash of it all beside every score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import experiment
import pytest
import stages
import tiny
import yaml

from pipeline.config import load_experiment
from pipeline.config.data import RowFilter, RowSample
from pipeline.data.examples import Example
from pipeline.data.tokenize import read_prompts
from pipeline.errors import DataError
from pipeline.plan import Plan, plan_experiment
from pipeline.stages import evaluate, prepare
from pipeline.stages.evaluate import EvaluatePlan, read_scores
from pipeline.stages.prepare import PROMPTS, filter_rows, sample_rows

BENCHMARKS = Path(__file__).resolve().parents[3] / "configs" / "benchmarks"
ROWS = [
    Example(f"r{i}", "say", "", (" ".join(["cat"] * (1 + i % 4)), "a longer reference that does not count")) for i in range(20)
]


def planned(folder: Path, **benchmark: Any) -> Plan:
    spec = {"source": {"path": str(folder / "general.jsonl")}, **benchmark}
    shared = {"decoding": {"max_new_tokens": 8}, "seeds": [1, 2]}
    read = {name: value for name, value in shared.items() if name not in benchmark}
    return stages.planned(folder, methods={"sft": None}, benchmarks={"mine": spec}, evaluation=read)


def evaluation(plan: Plan, method: str = "teacher") -> EvaluatePlan:
    return next(trial for trial in plan.trials if trial.method == method).evaluations[0]


def test_rows_are_filtered_by_their_first_reference() -> None:
    tokenizer = tiny.tokenizer()
    by_words = filter_rows(ROWS, RowFilter(min_reference_words=3), tokenizer)
    assert [row.id for row in by_words] == [f"r{i}" for i in range(20) if i % 4 >= 2]
    lengths = {row.id: len(tokenizer(row.references[0], add_special_tokens=False)["input_ids"]) for row in ROWS}
    by_tokens = filter_rows(ROWS, RowFilter(min_reference_tokens=4), tokenizer)
    assert {row.id for row in by_tokens} == {name for name, length in lengths.items() if length >= 4} != set(lengths)


def test_a_sample_depends_on_seed_and_ids_alone() -> None:
    sample = RowSample(rows=8, seed=3)
    chosen = sample_rows(ROWS, sample)
    assert len(chosen) == 8 and chosen == sorted(chosen, key=ROWS.index)
    assert {row.id for row in sample_rows(ROWS[::-1], sample)} == {row.id for row in chosen}
    assert {row.id for row in sample_rows(ROWS, RowSample(rows=8, seed=4))} != {row.id for row in chosen}
    rest = [row for row in ROWS if row not in chosen]
    assert sample_rows([*chosen, *rest[:5]], sample) == chosen  # rows that were not drawn play no role
    assert sample_rows(ROWS, RowSample(rows=99)) == ROWS


def test_a_prepared_benchmark_holds_what_filter_and_sample_leave(tmp_path: Path) -> None:
    plan = planned(tmp_path, filter={"min_reference_words": 4}, sample={"rows": 2, "seed": 1})
    rows = [json.loads(line) for line in (tmp_path / "general.jsonl").read_text().splitlines()]
    long_enough = {row["instruction"] for row in rows if len(row["output"].split()) >= 4}
    assert 2 < len(long_enough) < len(rows)
    artifact = prepare.run_benchmark(plan.benchmarks[0])
    prompts = read_prompts(artifact.path / PROMPTS)
    assert len(prompts) == 2 and all(any(text in prompt.prompt for text in long_enough) for prompt in prompts)
    counts = artifact.manifest.counts
    assert (counts["rows"], counts["kept"]) == (5, 2)
    assert (counts["filtered_out"], counts["not_sampled"]) == (5 - len(long_enough), len(long_enough) - 2)


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    plan = planned(tmp_path, filter={"min_reference_words": 500})
    with pytest.raises(DataError, match="benchmarks.mine.filter: no row of 5 is left"):
        prepare.run_benchmark(plan.benchmarks[0])


def test_a_benchmarks_own_protocol_wins(tmp_path: Path) -> None:
    own = {"decoding": {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5}, "seeds": [7, 8, 9]}
    plan = evaluation(planned(tmp_path, **own))
    assert plan.seeds == [7, 8, 9] and plan.decoding.temperature == 0.5
    assert evaluation(planned(tmp_path)).seeds == [1, 2]
    greedy = evaluation(planned(tmp_path, decoding={"do_sample": False}, seeds=[7, 8]))
    assert greedy.seeds == [7]


def test_every_score_has_its_protocol_and_hash(tmp_path: Path) -> None:
    plan = planned(tmp_path, decoding={"max_new_tokens": 3}, seeds=[7], sample={"rows": 2, "seed": 1}, version=4)
    prepare.run_benchmark(plan.benchmarks[0])
    job = evaluation(plan)
    artifact = evaluate.run(job, evaluate.load_subject(job.subject))
    scores = read_scores(artifact.path)
    protocol = scores["protocol"]
    assert scores["protocol_hash"] == job.protocol_hash and len(job.protocol_hash) == 16
    assert protocol["benchmark"] == "mine" and protocol["version"] == 4 and protocol["seeds"] == [7]
    assert protocol["template"] == "alpaca@1" and protocol["sample"] == {"rows": 2, "seed": 1}
    assert protocol["decoding"]["max_new_tokens"] == 3 and protocol["max_prompt_tokens"] == 256
    assert len(protocol["source"]["rows"]) == 64
    assert [seed["seed"] for seed in scores["per_seed"]] == [7]


def test_the_hash_is_the_same_for_every_model_and_covers_every_setting(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    first = evaluation(plan).protocol_hash
    assert evaluation(plan, "untrained").protocol_hash == evaluation(plan, "sft").protocol_hash == first
    changes: list[dict[str, Any]] = [
        {"version": 2}, {"filter": {"min_reference_words": 1}}, {"sample": {"rows": 2}}, {"max_prompt_tokens": 99},
        {"decoding": {"max_new_tokens": 7}}, {"seeds": [1]}, {"source": {"path": str(tmp_path / "tasks.jsonl")}},
    ]  # fmt: skip
    assert len({first, *(evaluation(planned(tmp_path, **change)).protocol_hash for change in changes)}) == 1 + len(changes)


def test_a_benchmarks_own_template_is_used(tmp_path: Path) -> None:
    plan = planned(tmp_path, template="chat")
    assert (plan.benchmarks[0].template, plan.data.config.template) == ("chat", "alpaca")
    assert plan.benchmarks[0].place.fingerprint != planned(tmp_path).benchmarks[0].place.fingerprint


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_benchmark_is_a_whole_spec(tmp_path: Path, file: Path) -> None:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**base(tmp_path), "include": [str(file)]}))
    loaded = load_experiment(tmp_path / "e.yaml")
    assert list(loaded.benchmarks) == [file.stem]
    spec = loaded.benchmarks[file.stem]
    assert spec.decoding is not None and spec.decoding.no_repeat_ngram_size == 6 and spec.seeds == [10, 20, 30, 40, 50]
    assert (spec.decoding.temperature, spec.decoding.top_p, spec.decoding.max_new_tokens) == (1, 1, 256)


def test_the_papers_benchmarks_are_shipped() -> None:
    loaded = load_experiment(BENCHMARKS.parent / "experiments" / "smollm2-dolly.yaml")
    assert set(loaded.benchmarks) == {file.stem for file in BENCHMARKS.glob("*.yaml")}
    assert set(loaded.benchmarks) == {"dolly", "self_inst", "vicuna", "s_ni", "unni"}


def test_adding_a_benchmark_is_one_file(tmp_path: Path) -> None:
    content = base(tmp_path)
    spec = {"source": {"path": str(tmp_path / "e/tasks.jsonl")}, "sample": {"rows": 3}, "seeds": [5]}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({"benchmarks": {"new": spec}}))
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**content, "include": ["new.yaml"]}))
    plan = plan_experiment(load_experiment(tmp_path / "e.yaml"), tmp_path / "runs")
    prepare.run_benchmark(plan.benchmarks[0])
    job = evaluation(plan)
    scores = read_scores(evaluate.run(job, evaluate.load_subject(job.subject)).path)
    assert plan.benchmarks[0].name == "new" and (scores["rows"], len(scores["per_seed"])) == (3, 1)


def base(folder: Path) -> dict[str, Any]:
    """The tiny experiment without benchmarks and how they are decoded."""
    content: dict[str, Any] = yaml.safe_load(experiment.write(folder / "e").read_text())
    del content["benchmarks"], content["evaluation"]
    return content
