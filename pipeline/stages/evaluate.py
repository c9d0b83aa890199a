"""Stage 4: one model's generations and scores on one benchmark, for every decoding seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import Artifact, canonical_json, text_digest, write_text_atomically
from pipeline.config.methods import Decoding, Evaluation
from pipeline.data.tokenize import read_prompts
from pipeline.evaluation.generate import DecodingProtocol
from pipeline.evaluation.runner import evaluate_benchmark
from pipeline.models import load
from pipeline.progress import progress
from pipeline.stages.fit import load_fitted
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import MODEL, Place, build, place
from pipeline.stages.prepare import PROMPTS, BenchmarkPlan
from pipeline.stages.student import StudentPlan
from pipeline.stages.train import TrainPlan
from pipeline.training.device import choose_device

VERSION = 2
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
    def decoding(self) -> Decoding:
        """The benchmark's own protocol, or the experiment's."""
        return self.benchmark.spec.decoding or self.evaluation.decoding

    @property
    def seeds(self) -> list[int]:
        """Decoding seeds; greedy decoding has only one outcome."""
        return _seeds(self.benchmark, self.evaluation)

    def protocol(self) -> dict[str, Any]:
        """Everything but the model that the scores depend on: two scores with equal protocols may be compared."""
        return {**self.benchmark.protocol(), "decoding": self.decoding.model_dump(mode="json"), "seeds": self.seeds}

    @property
    def protocol_hash(self) -> str:
        """16 hex digits of the protocol."""
        return text_digest(canonical_json(self.protocol()))[:16]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, shared by the benchmarks of one trial."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def plan_evaluation(subject: Subject, name: str, benchmark: BenchmarkPlan, evaluation: Evaluation, root: Path) -> EvaluatePlan:
    """Plan one evaluation; the decoding protocol and the seeds are part of its identity, the batch size is not."""
    decoding, seeds = benchmark.spec.decoding or evaluation.decoding, _seeds(benchmark, evaluation)
    recipe = {"decoding": decoding.model_dump(), "seeds": seeds, "benchmark_version": benchmark.spec.version}
    upstream = {"model": _identity(subject), "benchmark": benchmark.place.fingerprint}
    where = place(root, "evaluate", VERSION, f"evaluate {name} on {benchmark.name}", recipe, upstream)
    return EvaluatePlan(where, subject, benchmark, evaluation)


def load_subject(subject: Subject) -> LoadedModel:
    """Load the model that is to be evaluated."""
    if isinstance(subject, TrainPlan):
        folder = subject.place.open().path / MODEL
        model = load_fitted(subject.student.place.path, folder, choose_device())
    else:
        folder = subject.folder() if isinstance(subject, ModelPlan) else subject.place.open().path
        model = load.load_model(folder, device=choose_device())
    return LoadedModel(model, load.load_tokenizer(folder))


def run(plan: EvaluatePlan, loaded: LoadedModel) -> Artifact:
    """Generate, score and commit generations.parquet and scores.json."""

    def work(folder: Path) -> Mapping[str, Any]:
        prompts = list(read_prompts(plan.benchmark.place.open().path / PROMPTS))
        with progress(plan.place.label, len(prompts) * len(plan.seeds), "generations") as advance:
            scores = evaluate_benchmark(
                loaded.model, loaded.tokenizer, prompts, DecodingProtocol(**plan.decoding.model_dump()), plan.seeds,
                plan.evaluation.batch_size, folder / GENERATIONS, advance,
            )  # fmt: skip
        content = {**asdict(scores), "protocol": plan.protocol(), "protocol_hash": plan.protocol_hash}
        write_text_atomically(folder / SCORES, json.dumps(content))
        return {"rows": len(prompts), "generations": len(prompts) * len(plan.seeds)}

    return build(plan.place, work)


def read_scores(artifact: Path) -> dict[str, Any]:
    """scores.json of an evaluation."""
    scores: dict[str, Any] = json.loads((artifact / SCORES).read_text(encoding="utf-8"))
    return scores


def _seeds(benchmark: BenchmarkPlan, evaluation: Evaluation) -> list[int]:
    decoding, seeds = benchmark.spec.decoding or evaluation.decoding, benchmark.spec.seeds or evaluation.seeds
    return list(seeds) if decoding.do_sample else seeds[:1]


def _identity(subject: Subject) -> str:
    return subject.digest if isinstance(subject, ModelPlan) else subject.place.fingerprint
