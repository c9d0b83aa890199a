"""Evaluation by vLLM: the stage with a stand-in for the package, which needs a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as parquet
import pytest
import stages

from pipeline.errors import ConfigError
from pipeline.plan import check_inputs
from pipeline.stages import evaluate, import_model, prepare

VLLM = "evaluation.engine=vllm"
NGRAMS = "vllm.v1.worker.gpu.sample.logits_processor"


@dataclass
class Completion:
    token_ids: Sequence[int]
    finish_reason: str = "stop"
    cumulative_logprob: float = -1.0


@dataclass
class Output:
    outputs: list[Completion]


class FakeLLM:
    """Answers every request with its prompt's last three tokens and the end token."""

    started: list[dict[str, Any]] = []

    def __init__(self, **options: Any) -> None:
        self.started.append(options)

    def generate(self, prompts: Any, sampling_params: Any, /, *, use_tqdm: bool) -> list[Output]:
        return [
            Output([Completion([*prompt["prompt_token_ids"][-3:], asked["stop_token_ids"][0]])])
            for prompt, asked in zip(prompts, sampling_params, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **options: options
    monkeypatch.setattr(FakeLLM, "started", [])
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, NGRAMS, ModuleType(NGRAMS))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return FakeLLM


def test_generations_come_from_the_engine_and_are_scored(
    vllm: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = stages.planned(tmp_path, VLLM)
    check_inputs(plan)
    for model in plan.models:
        if model.place is not None:
            import_model.run(model)
    evaluation = plan.trials[0].evaluations[0]
    prepare.run_benchmark(evaluation.benchmark)
    served = evaluate.load_served(evaluation.subject)
    artifact = evaluate.run(evaluation, served)
    rows = parquet.read_table(artifact.path / evaluate.GENERATIONS).to_pylist()
    assert len(rows) == artifact.manifest.counts["generations"] > 0
    assert {row["n_tokens"] for row in rows} == {4}
    assert all(row["finished"] and row["prediction"] for row in rows)
    scores = evaluate.read_scores(artifact.path)
    assert scores["protocol"]["engine"] == "vllm"
    (started,) = vllm.started
    assert started["dtype"] == "float32" and Path(started["model"]).is_dir()


def test_scores_of_two_engines_are_not_one_artifact_and_not_one_protocol(vllm: type[FakeLLM], tmp_path: Path) -> None:
    ours, theirs = (stages.planned(tmp_path, *changes).trials[0].evaluations[0] for changes in ((), (VLLM,)))
    assert ours.place.fingerprint != theirs.place.fingerprint
    assert ours.protocol_hash != theirs.protocol_hash


def test_a_machine_without_it_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.engine is vllm.*evaluation\.engine=transformers"):
        check_inputs(stages.planned(tmp_path, VLLM))
    assert not (tmp_path / "runs").exists()


def test_an_adapter_alone_is_refused(vllm: type[FakeLLM], tmp_path: Path) -> None:
    lora = "train.lora={rank: 2, alpha: 4, target_modules: [c_attn], save_merged: false}"
    with pytest.raises(ConfigError, match=r"train\.lora\.save_merged is false"):
        check_inputs(stages.planned(tmp_path, VLLM, lora))
    check_inputs(stages.planned(tmp_path, VLLM, lora.replace("false", "true")))
