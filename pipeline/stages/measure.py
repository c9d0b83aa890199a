"""Stage: metrics beside ROUGE-L and exact match, each an artifact of its own, so that asking for one makes no other again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import Artifact, write_text_atomically
from pipeline.config.methods import Metrics
from pipeline.data.examples import EncodedExample, EncodedPrompt
from pipeline.data.tokenize import read_prompts
from pipeline.errors import DataError
from pipeline.evaluation.calibration import calibration
from pipeline.evaluation.exposure import excess_accumulated_error
from pipeline.evaluation.generate import DecodingProtocol, Generation, generate
from pipeline.evaluation.judge import TEMPLATE_ID, JudgeRow, JudgeSettings, judge_rows
from pipeline.evaluation.similarity import Encoder, load_encoder, similarity_rows
from pipeline.models.lens import logit_lens
from pipeline.models.load import load_model
from pipeline.progress import progress
from pipeline.stages import import_model
from pipeline.stages.evaluate import GENERATIONS, EvaluatePlan, LoadedModel
from pipeline.stages.fit import pad_id
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import PROMPTS
from pipeline.stages.train import common_vocabulary
from pipeline.training.device import choose_device

VERSION = 1
METRIC = "metric.json"


@dataclass(frozen=True)
class MetricPlan:
    """One metric of one model on one benchmark.

    Attributes:
        place: its artifact.
        name: the metric's name in results.csv.
        evaluation: model, benchmark and generations.
        settings: how it is measured.
        teacher: whom the student was to imitate.
        encoder: of the similarity, None without one.
        max_tokens: most tokens of a row that a model is shown with its reference.
        ratings: what the judge said so far, shared by everything that is judged in a run directory.
    """

    place: Place
    name: str
    evaluation: EvaluatePlan
    settings: Metrics
    teacher: ModelPlan
    encoder: ModelPlan | None
    max_tokens: int
    ratings: Path


@dataclass(frozen=True)
class Measured:
    """A metric's outcome.

    Attributes:
        values: one for each decoding seed that was measured; one alone where the benchmark's generations play no role, none
            where the metric is not defined.
        details: what else is written down.
        counts: for the manifest.
    """

    values: list[float]
    details: Mapping[str, Any]
    counts: Mapping[str, Any]


def plan_metrics(
    metrics: Metrics, name: str, evaluation: EvaluatePlan, teacher: ModelPlan, max_tokens: int, root: Path
) -> list[MetricPlan]:
    """Plan every metric that the experiment asks for, for the trial `name`.

    Raises:
        ModelError: the similarity's encoder is not where the configuration says.
    """
    what = "evaluation.metrics.similarity.model"
    encoder = None if metrics.similarity is None else import_model.plan_encoder(metrics.similarity.model, root, what)

    def plan(metric: str, recipe: Mapping[str, Any], upstream: Mapping[str, str]) -> MetricPlan:
        label = f"{metric} of {name} on {evaluation.benchmark.name}"
        where = place(root, "metric", VERSION, label, {"metric": metric, **recipe}, upstream)
        ratings = root.parent / "judge" / "ratings.jsonl"
        return MetricPlan(where, metric, evaluation, metrics, teacher, encoder, max_tokens, ratings)

    generated = {"evaluate": evaluation.place.fingerprint}
    # Metrics that look at no generation of the evaluation are the same under another decoding protocol.
    asked_of = dict(evaluation.place.upstream)
    plans = []
    if encoder is not None:
        plans.append(plan("similarity", {}, {**generated, "encoder": encoder.digest}))
    if metrics.calibration:
        plans.append(plan("ece", {"max_tokens": max_tokens}, asked_of))
    if metrics.exposure_bias is not None and evaluation.subject != teacher:
        recipe = {**metrics.exposure_bias.model_dump(mode="json"), "max_tokens": max_tokens}
        plans.append(plan("ex_acc_err", recipe, {**asked_of, "teacher": teacher.digest}))
    if metrics.judge is not None:
        # What an answer costs and how long is waited for it changes no rating.
        asked = metrics.judge.model_dump(mode="json", include={"base_url", "model", "max_reply_tokens", "decoding_seeds"})
        plans.append(plan("judge", {"template": TEMPLATE_ID, **asked}, generated))
    return plans


def run(plan: MetricPlan, load: Callable[[], LoadedModel]) -> Artifact:
    """Measure and commit metric.json.

    Args:
        plan: the metric.
        load: gives the model; called only for metrics that look at it.

    Raises:
        ConfigError, JudgeError: see `pipeline.evaluation.judge.judge_rows`.
        DataError: there is nothing to measure, or no answer got a rating.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        measured = _MEASURES[plan.name](plan, load)
        content = {"name": plan.name, "values": measured.values, **measured.details}
        write_text_atomically(folder / METRIC, json.dumps(content))
        return measured.counts

    return build(plan.place, work)


def read_metric(plan: MetricPlan) -> list[float]:
    """A finished metric's values."""
    content = json.loads((plan.place.open().path / METRIC).read_text(encoding="utf-8"))
    return [float(value) for value in content["values"]]


def reference_rows(
    prompts: Sequence[EncodedPrompt], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[EncodedExample]:
    """Each prompt with its first reference and the end token, encoded as training rows are; blank references are left out."""
    texts = [prompt.references[0] for prompt in prompts]
    responses = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = int(tokenizer.eos_token_id)
    return [
        EncodedExample(prompt.id, (*prompt.input_ids, *response, end)[:max_tokens], len(prompt.input_ids))
        for prompt, text, response in zip(prompts, texts, responses, strict=True)
        if text.strip() and len(prompt.input_ids) < max_tokens
    ]


def _similar(plan: MetricPlan, load: Callable[[], LoadedModel]) -> Measured:
    config, encoder = plan.settings.similarity, plan.encoder
    assert config is not None and encoder is not None  # only such a plan is made
    rows = _generations(plan)
    predictions, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    scores = similarity_rows(_encoder(encoder.folder()), predictions, references, config.batch_size)
    seeds = plan.evaluation.seeds
    values = [statistics.fmean(score for row, score in zip(rows, scores, strict=True) if row["seed"] == seed) for seed in seeds]
    return Measured(values, {"seeds": seeds}, {"answers": len(rows)})


@lru_cache(maxsize=1)
def _encoder(folder: Path) -> Encoder:
    return load_encoder(folder, choose_device())


def _generations(plan: MetricPlan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(plan.evaluation.place.open().path / GENERATIONS).to_pylist()
    return rows


def _exposed(plan: MetricPlan, load: Callable[[], LoadedModel]) -> Measured:
    config, loaded = plan.settings.exposure_bias, load()
    assert config is not None  # only such a plan is made
    prompts = read_prompts(plan.evaluation.benchmark.place.open().path / PROMPTS)[: config.rows]
    teacher = load_model(plan.teacher.folder(), device=choose_device())
    lens = logit_lens(teacher)
    size = common_vocabulary(lens.head.size, loaded.model, len(loaded.tokenizer))
    lens = replace(lens, head=replace(lens.head, vocab_size=size))
    batch_size, pad = plan.evaluation.evaluation.batch_size, pad_id(loaded.tokenizer)
    protocol = DecodingProtocol(max_new_tokens=config.lengths[-1], do_sample=True)
    with progress(plan.place.label, 2 * len(prompts), "generations") as advance:
        student_rows, oracle_rows = (
            _responses(
                generate(m, loaded.tokenizer, prompts, protocol, [config.seed], batch_size, plan.max_tokens, advance), prompts
            )
            for m in (loaded.model, teacher)
        )
    found = excess_accumulated_error(
        teacher, lens, loaded.model, logit_lens(loaded.model, size), student_rows, oracle_rows,
        [len(prompt.input_ids) for prompt in prompts], config.lengths, batch_size, pad,
    )  # fmt: skip
    last = found.excess_percent[-1]
    return Measured([] if last is None else [last], {"exposure_bias": asdict(found)}, {"rows": len(prompts)})


def _responses(generations: Iterable[Generation], prompts: Sequence[EncodedPrompt]) -> list[tuple[int, ...]]:
    """Prompt and response tokens, in the prompts' order."""
    found = {generation.id: generation.token_ids for generation in generations}
    return [(*prompt.input_ids, *found[prompt.id]) for prompt in prompts]


def _calibrated(plan: MetricPlan, load: Callable[[], LoadedModel]) -> Measured:
    loaded = load()
    prompts = read_prompts(plan.evaluation.benchmark.place.open().path / PROMPTS)
    rows = reference_rows(prompts, loaded.tokenizer, plan.max_tokens)
    if not rows:
        raise DataError(
            f"{plan.place.label}: every reference of {plan.evaluation.benchmark.name} is blank; give it rows with references"
        )
    batch_size, pad = plan.evaluation.evaluation.batch_size, pad_id(loaded.tokenizer)
    found = calibration(loaded.model, logit_lens(loaded.model), rows, batch_size, pad)
    return Measured([found.ece], {"calibration": asdict(found)}, {"rows": len(rows)})


def _judged(plan: MetricPlan, load: Callable[[], LoadedModel]) -> Measured:
    config = plan.settings.judge
    assert config is not None  # only such a plan is made
    seeds = plan.evaluation.seeds[: config.decoding_seeds]
    judged = [row for row in _generations(plan) if row["seed"] in seeds]
    asked = [JudgeRow(row["prompt"], row["references"][0], row["prediction"]) for row in judged]
    with progress(plan.place.label, len(asked), "answers") as advance:
        result = judge_rows(JudgeSettings(**config.model_dump(exclude={"decoding_seeds"})), asked, plan.ratings, advance)
    ratings = list(zip((row["seed"] for row in judged), result.scores, strict=True))
    found = {seed: [score for owner, score in ratings if owner == seed and score is not None] for seed in seeds}
    for seed, scores in found.items():
        if not scores:
            raise DataError(
                f"{plan.place.label}: {config.model} gave no rating for any answer of decoding seed {seed}; "
                "its replies must end with Rating: [[n]], use another judge or raise max_reply_tokens"
            )
    counts = {name: getattr(result, name) for name in ("unparsable", "requests", "tokens", "from_cache")}
    values = [statistics.fmean(scores) for scores in found.values()]
    return Measured(values, {"seeds": seeds}, {"answers": len(asked), **counts})


_MEASURES: dict[str, Callable[[MetricPlan, Callable[[], LoadedModel]], Measured]] = {
    "similarity": _similar,
    "ece": _calibrated,
    "ex_acc_err": _exposed,
    "judge": _judged,
}
