"""Stage 4: one model's generations and scores on one benchmark, for every decoding seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import Artifact, write_text_atomically
from pipeline.config.methods import Evaluation
from pipeline.data.tokenize import read_prompts
from pipeline.evaluation.generate import DecodingProtocol
from pipeline.evaluation.runner import evaluate_benchmark
from pipeline.models import load
from pipeline.progress import progress
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import PROMPTS, BenchmarkPlan
from pipeline.stages.student import StudentPlan
from pipeline.stages.train import MODEL, TrainPlan
from pipeline.training.device import choose_device

VERSION = 1
GENERATIONS, SCORES = "generations.parquet", "scores.json"
Subject = ModelPlan | StudentPlan | TrainPlan
"""What can be evaluated: a model as it is, the untrained student, a trained one."""


@dataclass(frozen=True)
class EvaluatePlan:
    """One model on one benchmark."""

    place: Place
    subject: Subject
    benchmark: BenchmarkPlan
    evaluation: Evaluation

    @property
    def seeds(self) -> list[int]:
        """Decoding seeds; greedy decoding has only one outcome."""
        return list(self.evaluation.seeds) if self.evaluation.decoding.do_sample else self.evaluation.seeds[:1]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, shared by the benchmarks of one trial."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def plan_evaluation(subject: Subject, name: str, benchmark: BenchmarkPlan, evaluation: Evaluation, root: Path) -> EvaluatePlan:
    """Plan one evaluation; the decoding protocol and the seeds are part of its identity, the batch size is not."""
    seeds = evaluation.seeds if evaluation.decoding.do_sample else evaluation.seeds[:1]
    recipe = {"decoding": evaluation.decoding.model_dump(), "seeds": list(seeds), "benchmark_version": benchmark.version}
    upstream = {"model": _identity(subject), "benchmark": benchmark.place.fingerprint}
    where = place(root, "evaluate", VERSION, f"evaluate {name} on {benchmark.name}", recipe, upstream)
    return EvaluatePlan(where, subject, benchmark, evaluation)


def load_subject(subject: Subject) -> LoadedModel:
    """Load the model that is to be evaluated."""
    if isinstance(subject, ModelPlan):
        folder = subject.folder()
    elif isinstance(subject, StudentPlan):
        folder = subject.place.open().path
    else:
        folder = subject.place.open().path / MODEL
    return LoadedModel(load.load_model(folder, device=choose_device()), load.load_tokenizer(folder))


def run(plan: EvaluatePlan, loaded: LoadedModel) -> Artifact:
    """Generate, score and commit generations.parquet and scores.json."""

    def work(folder: Path) -> Mapping[str, Any]:
        prompts = list(read_prompts(plan.benchmark.place.open().path / PROMPTS))
        with progress(plan.place.label, len(prompts) * len(plan.seeds), "generations") as advance:
            scores = evaluate_benchmark(
                loaded.model, loaded.tokenizer, prompts, DecodingProtocol(**plan.evaluation.decoding.model_dump()), plan.seeds,
                plan.evaluation.batch_size, folder / GENERATIONS, advance,
            )  # fmt: skip
        write_text_atomically(folder / SCORES, json.dumps(asdict(scores)))
        return {"rows": len(prompts), "generations": len(prompts) * len(plan.seeds)}

    return build(plan.place, work)


def read_scores(artifact: Path) -> dict[str, Any]:
    """scores.json of an evaluation."""
    scores: dict[str, Any] = json.loads((artifact / SCORES).read_text(encoding="utf-8"))
    return scores


def _identity(subject: Subject) -> str:
    return subject.digest if isinstance(subject, ModelPlan) else subject.place.fingerprint
