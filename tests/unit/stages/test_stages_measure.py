"""Metrics beside ROUGE-L: measured on generations that are there, each an artifact of its own, all in one table."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import stages
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import Artifact
from pipeline.data.prompts import render
from pipeline.data.tokenize import read_prompts
from pipeline.errors import DataError, ModelError
from pipeline.evaluation.generate import DecodingProtocol, generate
from pipeline.plan import Plan
from pipeline.stages import compare, evaluate, measure, prepare, student, train
from pipeline.stages.evaluate import GENERATIONS
from pipeline.stages.measure import MetricPlan, read_metric

SETTINGS = ("validation.select=loss", "train.seeds=[10]", "train.max_steps=1")


class Judge(BaseHTTPRequestHandler):
    """Rates every answer by the length of its prompt, in the form that is asked for."""

    requests: list[str] = []
    reply = "It is an answer. Rating: [[{rating}]]"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        Judge.requests.append(text)
        reply = Judge.reply.format(rating=1 + len(text) % 10)
        content = json.dumps({
            "choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
        }).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Judge, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def planned(folder: Path, judge: dict[str, Any] | None, **metrics: Any) -> Plan:
    evaluation = {"decoding": {"max_new_tokens": 4}, "seeds": [1, 2], "metrics": {"judge": judge, **metrics}}
    return stages.planned(folder, *SETTINGS, methods={"sft": None}, evaluation=evaluation)


def judge(endpoint: str, **changes: Any) -> dict[str, Any]:
    return {"base_url": endpoint, "model": "j", "max_requests": 500, **changes}


def evaluated(plan: Plan) -> Plan:
    prepare.run(plan.data)
    student.run(plan.student)
    for benchmark in plan.benchmarks:
        prepare.run_benchmark(benchmark)
    train.run(stages.training(plan, "sft"))
    for trial in plan.trials:
        loaded = evaluate.load_subject(trial.evaluations[0].subject)
        for job in trial.evaluations:
            evaluate.run(job, loaded)
    return plan


def run(metric: MetricPlan) -> Artifact:
    return measure.run(metric, lambda: evaluate.load_subject(metric.evaluation.subject))


def metrics(plan: Plan) -> list[MetricPlan]:
    return [metric for trial in plan.trials for metric in trial.metrics]


def test_ratings_are_rows_of_the_comparison(tmp_path: Path, endpoint: str) -> None:
    plan = evaluated(planned(tmp_path, judge(endpoint, decoding_seeds=2)))
    assert len(metrics(plan)) == 3 * 2
    for metric in metrics(plan):
        run(metric)
    artifact = compare.run(plan.comparison)
    rows = [row for row in csv.DictReader((artifact.path / "results.csv").open()) if row["metric"] == "judge"]
    assert {(row["method"], row["benchmark"]) for row in rows} == {
        (method, name) for method in ("teacher", "untrained", "sft") for name in ("general", "tasks", "avg")
    }
    assert {row["n_decoding_seeds"] for row in rows} == {"2"} and all(1 <= float(row["mean"]) <= 10 for row in rows)
    assert any(text.startswith("judge: mean rating by j, 1 (useless)") for text in stages.reading_notes(plan.comparison))
    assert "<h2>judge</h2>" in (artifact.path / "report.html").read_text()


def test_the_mean_is_over_the_answers_of_the_first_decoding_seed(tmp_path: Path, endpoint: str) -> None:
    plan = evaluated(planned(tmp_path, judge(endpoint)))
    first = metrics(plan)[0]
    artifact = run(first)
    rows = parquet.read_table(first.evaluation.place.path / GENERATIONS).to_pylist()
    answers = [row["prediction"] for row in rows if row["seed"] == 1]
    assert len(Judge.requests) == len(answers) == 5 == artifact.manifest.counts["answers"]
    assert all(any(answer in request for request in Judge.requests) for answer in answers)
    expected = sum(1 + len(request) % 10 for request in Judge.requests) / 5
    assert read_metric(first) == [pytest.approx(expected)]


def test_nothing_is_asked_twice(tmp_path: Path, endpoint: str) -> None:
    plan = evaluated(planned(tmp_path, judge(endpoint)))
    run(metrics(plan)[0])
    asked = len(Judge.requests)
    run(metrics(plan)[0])
    assert len(Judge.requests) == asked
    # Another seed's answers make another artifact, but those of the first seed are rated already.
    again = planned(tmp_path, judge(endpoint, decoding_seeds=2))
    assert run(metrics(again)[0]).manifest.counts["from_cache"] >= 5
    assert len(Judge.requests) <= 2 * asked


def test_a_metric_leaves_generations_and_budget_settings_leave_the_metric_alone(tmp_path: Path, endpoint: str) -> None:
    without, plain = planned(tmp_path, None), planned(tmp_path, judge(endpoint))
    assert metrics(without) == []
    same = zip(without.trials, plain.trials, strict=True)
    assert all(a.evaluations[0].place.fingerprint == b.evaluations[0].place.fingerprint for a, b in same)
    first = metrics(plain)[0].place.fingerprint
    richer = planned(tmp_path, judge(endpoint, max_requests=9, workers=1, timeout_seconds=5))
    assert metrics(richer)[0].place.fingerprint == first
    assert metrics(planned(tmp_path, judge(endpoint, model="k")))[0].place.fingerprint != first


def test_a_judge_without_ratings_is_an_error(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "reply", "I like it.")
    plan = evaluated(planned(tmp_path, judge(endpoint)))
    with pytest.raises(DataError, match="j gave no rating for any answer of decoding seed 1"):
        run(metrics(plan)[0])


@torch.no_grad()
def plain_calibration(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Expected calibration error from full logits, one row at a time, fifteen bins, per cent."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    confidences, hits = [], []
    for row in rows:
        prompt = tokenizer(render("alpaca", row["instruction"], row["input"], tokenizer))["input_ids"]
        ids = [*prompt, *tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        probabilities = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
        top = probabilities.max(-1)
        confidences.append(top.values)
        hits.append(top.indices == torch.tensor(ids[len(prompt) :]))
    confidence, hit = torch.cat(confidences), torch.cat(hits).double()
    index = (confidence * 15).ceil().long() - 1
    gaps = [(hit[index == b].sum() - confidence[index == b].sum()).abs() for b in range(15)]
    return 100 * float(torch.stack(gaps).sum()) / len(hit)


def test_calibration_is_over_the_references_of_the_benchmark(tmp_path: Path) -> None:
    plan = evaluated(planned(tmp_path, None, calibration=True))
    first = metrics(plan)[0]
    assert (first.name, first.evaluation.benchmark.name) == ("ece", "general")
    artifact = run(first)
    rows = [json.loads(line) for line in (tmp_path / "general.jsonl").read_text().splitlines()]
    assert read_metric(first) == [pytest.approx(plain_calibration(tmp_path / "teacher", rows), rel=1e-4)]
    content = json.loads((artifact.path / "metric.json").read_text())
    assert len(content["calibration"]["bins"]) == 15 and artifact.manifest.counts["rows"] == 5


def test_calibration_does_not_depend_on_decoding(tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        evaluation = {"decoding": {"max_new_tokens": 4}, "seeds": [1], "metrics": {"calibration": True}}
        return metrics(stages.planned(tmp_path, *overrides, methods={"sft": None}, evaluation=evaluation))[0].place.fingerprint

    assert fingerprint() == fingerprint("evaluation.seeds=[3]") == fingerprint("evaluation.decoding.top_p=0.5")
    assert fingerprint() != fingerprint("data.max_prompt_tokens=64")


def test_a_metric_that_needs_no_model_loads_none(tmp_path: Path, endpoint: str) -> None:
    plan = evaluated(planned(tmp_path, judge(endpoint)))

    def load() -> Any:
        raise AssertionError("the judge needs no model")

    measure.run(metrics(plan)[0], load)


def test_metrics_with_other_numbers_of_values_stand_in_one_table(tmp_path: Path, endpoint: str) -> None:
    plan = evaluated(planned(tmp_path, judge(endpoint, decoding_seeds=2), calibration=True))
    for metric in metrics(plan):
        run(metric)
    artifact = compare.run(plan.comparison)
    rows = [row for row in csv.DictReader((artifact.path / "results.csv").open()) if row["method"] == "sft"]
    counts = {(row["benchmark"], row["metric"]): row["n_decoding_seeds"] for row in rows}
    assert counts["avg", "ece"] == "1" and counts["avg", "judge"] == "2" and counts["avg", "rouge_l"] == "2"
    assert any(text.startswith("ece: expected calibration error") for text in stages.reading_notes(plan.comparison))


class Lengths:
    """An encoder that knows a text's length alone."""

    def embed(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        vectors = torch.tensor([[1.0, len(text)] for text in texts], dtype=torch.float64)
        return torch.nn.functional.normalize(vectors, dim=-1)


def encoder_folder(folder: Path) -> Path:
    """Enough of an encoder to be located."""
    tiny.save(tiny.llama(layers=1), folder)
    return folder


def test_similarity_is_one_value_for_each_decoding_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"kind": "local", "path": str(encoder_folder(tmp_path / "encoder"))}
    plan = evaluated(planned(tmp_path, None, similarity={"model": model}))
    monkeypatch.setattr(measure, "_encoder", lambda folder: Lengths())
    first = metrics(plan)[0]
    run(first)
    rows = parquet.read_table(first.evaluation.place.path / GENERATIONS).to_pylist()
    expected = []
    for seed in (1, 2):
        pairs = [(len(row["prediction"]), len(row["references"][0])) for row in rows if row["seed"] == seed]
        expected.append(sum(100 * (1 + p * r) / ((1 + p * p) * (1 + r * r)) ** 0.5 for p, r in pairs) / len(pairs))
    assert (first.name, read_metric(first)) == ("similarity", pytest.approx(expected))
    assert any(text.startswith("similarity: 100") for text in stages.reading_notes(plan.comparison))


def test_another_encoder_is_another_metric(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        model = {"kind": "local", "path": str(folder)}
        return metrics(planned(tmp_path, None, similarity={"model": model}))[0].place.fingerprint

    first = encoder_folder(tmp_path / "encoder")
    other = tiny.save(tiny.llama(layers=1, seed=5), tmp_path / "other")
    assert fingerprint(first) != fingerprint(other)


def test_an_encoder_out_of_a_package_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    folder = encoder_folder(tmp_path / "carrier" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    model = {"kind": "package", "package": "carrier", "folder": "model"}
    found = metrics(planned(tmp_path, None, similarity={"model": model}))[0].encoder
    assert found is not None and found.folder() == folder
    with pytest.raises(ModelError, match="evaluation.metrics.similarity.model.package: 'absent' is not an installed package"):
        planned(tmp_path, None, similarity={"model": {**model, "package": "absent"}})


def test_exposure_bias_compares_the_students_own_responses_with_the_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = evaluated(planned(tmp_path, None, exposure_bias={"lengths": [1, 3], "rows": 3, "seed": 4}))
    assert [metric.evaluation.subject for metric in metrics(plan)].count(plan.trials[0].evaluations[0].subject) == 0
    untrained = metrics(plan)[0]
    given: list[Any] = []
    excess = measure.excess_accumulated_error

    def spy(*arguments: Any) -> Any:
        given.extend(arguments)
        return excess(*arguments)

    monkeypatch.setattr(measure, "excess_accumulated_error", spy)
    artifact = run(untrained)
    prompts = read_prompts(untrained.evaluation.benchmark.place.path / "prompts.arrow")[:3]
    protocol, tokenizer = DecodingProtocol(max_new_tokens=3, do_sample=True), tiny.tokenizer()
    for folder, sequences in ((plan.student.place.path, given[4]), (tmp_path / "teacher", given[5])):
        model = AutoModelForCausalLM.from_pretrained(folder)
        own = {found.id: found.token_ids for found in generate(model, tokenizer, prompts, protocol, [4], 8)}
        assert sequences == [(*prompt.input_ids, *own[prompt.id]) for prompt in prompts]
    content = json.loads((artifact.path / "metric.json").read_text())["exposure_bias"]
    assert read_metric(untrained) == [content["excess_percent"][1]] and content["lengths"] == [1, 3]
    assert any(
        text.startswith("ex_acc_err: excess accumulated error after 3 tokens") for text in stages.reading_notes(plan.comparison)
    )


def test_a_metric_that_is_not_defined_leaves_its_cell_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = evaluated(planned(tmp_path, None, exposure_bias={"lengths": [2], "rows": 2}))
    for metric in metrics(plan):
        run(metric)
    # A student that equals its teacher makes no error, so its excess is undefined.
    first = metrics(plan)[0]
    monkeypatch.setattr(compare, "read_metric", lambda metric: [] if metric == first else read_metric(metric))
    artifact = compare.run(plan.comparison)
    rows = [row for row in csv.DictReader((artifact.path / "results.csv").open()) if row["metric"] == "ex_acc_err"]
    assert {(row["method"], row["benchmark"]) for row in rows} == {
        ("untrained", "tasks"), ("sft", "general"), ("sft", "tasks"), ("sft", "avg"),
    }  # fmt: skip
