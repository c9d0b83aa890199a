"""Stage 4: one model's generations and scores on one benchmark, for every decoding seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import Artifact, canonical_json, text_digest, write_text_atomically
from pipeline.config.methods import Decoding, Evaluation
from pipeline.data.examples import EncodedPrompt
from pipeline.data.tokenize import read_prompts
from pipeline.errors import ConfigError
from pipeline.evaluation import vllm_backend
from pipeline.evaluation.generate import DecodingProtocol, check_lengths, context_length
from pipeline.evaluation.runner import BenchmarkScores, evaluate_benchmark, evaluate_with
from pipeline.models import load
from pipeline.progress import Advance, progress
from pipeline.stages.fit import load_fitted
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import MODEL, Place, build, place
from pipeline.stages.prepare import PROMPTS, BenchmarkPlan
from pipeline.stages.student import StudentPlan
from pipeline.stages.train import TrainPlan
from pipeline.training.device import choose_device

VERSION = 3
GENERATIONS, SCORES = "generations.parquet", "scores.json"
Subject = ModelPlan | StudentPlan | TrainPlan
"""What can be evaluated: a model as it is, the untrained student, a trained one."""
_VLLM_SEQUENCES = 512
"""vLLM makes its own batches; so many responses are asked for, and written to disk, at a time."""


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
        return {
            **self.benchmark.protocol(),
            "decoding": self.decoding.model_dump(mode="json"),
            "seeds": self.seeds,
            # Engines sample other responses from the same distribution, so their scores are not mixed.
            "engine": self.evaluation.engine,
        }

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
    recipe = {
        "decoding": decoding.model_dump(), "seeds": seeds, "benchmark_version": benchmark.spec.version,
        "engine": evaluation.engine,
    }  # fmt: skip
    upstream = {"model": _identity(subject), "benchmark": benchmark.place.fingerprint}
    where = place(root, "evaluate", VERSION, f"evaluate {name} on {benchmark.name}", recipe, upstream)
    return EvaluatePlan(where, subject, benchmark, evaluation)


@dataclass(frozen=True)
class ServedModel:
    """A model in vLLM, shared by the benchmarks of one trial."""

    engine: vllm_backend.Engine
    tokenizer: PreTrainedTokenizerBase
    context: int | None


def load_served(subject: Subject) -> ServedModel:
    """Start vLLM on the model that is to be evaluated.

    Raises:
        ConfigError, ModelError: see `pipeline.evaluation.vllm_backend.load_engine`.
    """
    folder = _folder(subject)
    # float32, as the other engine: the precision of an evaluation is no setting of its own.
    engine = vllm_backend.load_engine(folder, "float32")
    context = context_length(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return ServedModel(engine, load.load_tokenizer(folder), context)


def check_engine(plan: EvaluatePlan) -> None:
    """Refuse what the chosen engine cannot do on this machine, before anything runs.

    Raises:
        ConfigError: see `pipeline.evaluation.vllm_backend`; also an adapter, which vLLM would need as a whole checkpoint.
    """
    if plan.evaluation.engine == "transformers":
        return
    vllm_backend.check_available()
    vllm_backend.check_protocol(DecodingProtocol(**plan.decoding.model_dump()))
    adapter = plan.subject.training.lora if isinstance(plan.subject, TrainPlan) else None
    if adapter is not None and not adapter.save_merged:
        raise ConfigError(
            "evaluation.engine is vllm, which reads whole checkpoints, but train.lora.save_merged is false; set it to true, "
            "or set evaluation.engine=transformers"
        )


def load_subject(subject: Subject) -> LoadedModel:
    """Load the model that is to be evaluated."""
    folder = _folder(subject)
    if isinstance(subject, TrainPlan):
        model = load_fitted(subject.student.place.open().path, folder, choose_device())
    else:
        model = load.load_model(folder, device=choose_device())
    return LoadedModel(model, load.load_tokenizer(folder))


def _folder(subject: Subject) -> Path:
    if isinstance(subject, TrainPlan):
        return subject.place.open().path / MODEL
    return subject.folder() if isinstance(subject, ModelPlan) else subject.place.open().path


def run(plan: EvaluatePlan, loaded: LoadedModel | ServedModel) -> Artifact:
    """Generate, score and commit generations.parquet and scores.json."""

    def work(folder: Path) -> Mapping[str, Any]:
        prompts = list(read_prompts(plan.benchmark.place.open().path / PROMPTS))
        with progress(plan.place.label, len(prompts) * len(plan.seeds), "generations") as advance:
            scores = _evaluate(plan, loaded, prompts, folder / GENERATIONS, advance)
        content = {**asdict(scores), "protocol": plan.protocol(), "protocol_hash": plan.protocol_hash}
        write_text_atomically(folder / SCORES, json.dumps(content))
        return {"rows": len(prompts), "generations": len(prompts) * len(plan.seeds)}

    return build(plan.place, work)


def _evaluate(
    plan: EvaluatePlan, loaded: LoadedModel | ServedModel, prompts: Sequence[EncodedPrompt], out: Path, advance: Advance
) -> BenchmarkScores:
    protocol = DecodingProtocol(**plan.decoding.model_dump())
    if isinstance(loaded, LoadedModel):
        return evaluate_benchmark(
            loaded.model, loaded.tokenizer, prompts, protocol, plan.seeds, plan.evaluation.batch_size, out, advance
        )
    check_lengths(loaded.context, prompts, protocol, None)
    decoder = vllm_backend.VllmDecoder(loaded.engine, loaded.tokenizer, protocol, plan.seeds)
    return evaluate_with(decoder, f"vllm {_identity(plan.subject)}", prompts, _VLLM_SEQUENCES, out, advance)


def read_scores(artifact: Path) -> dict[str, Any]:
    """scores.json of an evaluation."""
    scores: dict[str, Any] = json.loads((artifact / SCORES).read_text(encoding="utf-8"))
    return scores


def _seeds(benchmark: BenchmarkPlan, evaluation: Evaluation) -> list[int]:
    decoding, seeds = benchmark.spec.decoding or evaluation.decoding, benchmark.spec.seeds or evaluation.seeds
    return list(seeds) if decoding.do_sample else seeds[:1]


def _identity(subject: Subject) -> str:
    return subject.digest if isinstance(subject, ModelPlan) else subject.place.fingerprint
