"""What a report says of experiments, by itself: it can be made again without their plans, models, data or artifacts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from pipeline.artifacts import canonical_json, text_digest
from pipeline.config.base import ExperimentName
from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
from pipeline.reporting.aggregate import RunScores
from pipeline.reporting.overlap import Overlap
from pipeline.reporting.paper import Score

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
"""What tables and figures can show."""
DATA = "training data"
"""What an input is, see `InputRecord`."""


def _seen(text: str) -> str:
    if _UNSEEN.search(text):
        raise ValueError("has characters that cannot be shown")
    return text


Text = Annotated[str, StringConstraints(max_length=10_000), AfterValidator(_seen)]
"""What a terminal may print, wherever it comes from."""
Print = Annotated[str, StringConstraints(pattern="^[!-~]+$", max_length=1000)]
"""A fingerprint or digest."""


def _drawable(heat: LensHeat) -> LensHeat:
    if len(heat.pairs) > 256 or len(heat.tokens) > 64 or any(len(token) > 200 for token in heat.tokens):
        raise ValueError("has more than 256 layers, 64 tokens or 200 characters in a token")
    if not all(0 <= layer <= 10_000 for pair in heat.pairs for layer in pair):
        raise ValueError("has a layer that no model has")
    _seen("".join(heat.tokens))
    return heat


Heat = Annotated[LensHeat, AfterValidator(_drawable)]
"""A heat map that can be drawn, wherever it comes from."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation came to.

    Attributes:
        rows: prompts.
        share_cut: share of the responses that were cut at their limit, 0–1.
        per_seed: metric → one score per decoding seed; one alone where seeds play no role.
    """

    __pydantic_config__ = _CONFIG
    rows: Count
    share_cut: Number
    per_seed: dict[Text, list[Number]]


@dataclass(frozen=True)
class EvaluationRecord:
    """A model on a benchmark.

    Attributes:
        benchmark: its name.
        label: what people read, for example "evaluate kd s10 on general".
        fingerprint: of the evaluation.
        conditions: of everything about it but the model.
        prompts: of the tokenised prompts.
        protocol: how the model was asked and decoded.
        measured: None for one that is only planned.
    """

    __pydantic_config__ = _CONFIG
    benchmark: Text
    label: Text
    fingerprint: Print
    conditions: Print
    prompts: Print
    protocol: dict[Text, Any]
    measured: Measured | None = None

    @property
    def protocol_hash(self) -> str:
        """16 hex digits of the protocol, as they are stored with the scores."""
        return text_digest(canonical_json(self.protocol))[:16]


@dataclass(frozen=True)
class InputRecord:
    """Something that a training started from.

    Attributes:
        what: "training data", "student" or "teacher".
        name: short name for people.
        label: of the stage that made it.
        fingerprint: of it.
    """

    __pydantic_config__ = _CONFIG
    what: Text
    name: Text
    label: Text
    fingerprint: Print


@dataclass(frozen=True)
class SharedWork:
    """Work whose result several trainings use, and how long it took."""

    __pydantic_config__ = _CONFIG
    label: Text
    fingerprint: Print
    seconds: Number


@dataclass(frozen=True)
class TrainingRun:
    """What a finished training took, and its learning curves: metric → (step, value)."""

    __pydantic_config__ = _CONFIG
    seconds: Number
    steps: Count
    tokens: Count
    peak_memory_gib: Number
    best_step: Count
    learning_rate: Number
    versions: dict[Text, Text]
    curves: dict[Text, list[tuple[Count, Number]]]


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained.

    Attributes:
        label: for example "train kd s10".
        fingerprint: of the training.
        family: of everything that its result depends on but the training seed.
        settings: every setting that a method can have of its own, by dotted path.
        searched: whether the learning rate was searched for.
        own_batches: whether it was trained on the teacher's responses, which are batched by their own lengths.
        inputs: training data, student, and the teacher.
        asks_teacher: whether its objective has one.
        run: None where its artifact is not here.
        shared: work that others use too, as far as its artifacts are here.
    """

    __pydantic_config__ = _CONFIG
    label: Text
    fingerprint: Print
    family: Print
    settings: dict[Text, Any]
    searched: bool
    own_batches: bool
    inputs: list[InputRecord]
    asks_teacher: bool
    run: TrainingRun | None = None
    shared: list[SharedWork] = field(default_factory=list)

    @property
    def data(self) -> str:
        """Fingerprint of its training data."""
        return next(own.fingerprint for own in self.inputs if own.what == DATA)


@dataclass(frozen=True)
class TrialRecord:
    """A model of the comparison.

    Attributes:
        method, variant, seed: as of a `pipeline.stages.compare.Trial`.
        row: its row in the table.
        origins: fingerprints of the experiments' comparisons that have it.
        model: fingerprint of what was evaluated.
        training: None for models that were not trained here.
        evaluations: one per benchmark.
        profile: through the logit lens, None where there is none.
        heat: through it too, token by token on one dev row.
    """

    __pydantic_config__ = _CONFIG
    method: Text
    variant: Text
    seed: Count | None
    row: Text
    origins: list[Print]
    model: Print
    training: TrainingRecord | None
    evaluations: list[EvaluationRecord]
    profile: list[LayerProfile] | None = None
    heat: Heat | None = None

    @property
    def own_row(self) -> str:
        """Its row in its own experiment."""
        return f"{self.method} {self.variant}".strip()

    @property
    def name(self) -> str:
        """Short name for people: `distilllens s10`."""
        return self.row if self.seed is None else f"{self.row} s{self.seed}"

    @property
    def by_benchmark(self) -> dict[str, EvaluationRecord]:
        """Its evaluations by the benchmark's name."""
        return {own.benchmark: own for own in self.evaluations}


@dataclass(frozen=True)
class RowCounts:
    """Training rows: all, those that are left, those of them whose response was cut, and those left out for their prompt."""

    __pydantic_config__ = _CONFIG
    rows: Count
    kept: Count
    cut_response: Count
    overlong_prompt: Count


@dataclass(frozen=True)
class DataRecord:
    """Training data.

    Attributes:
        fingerprint: of the tokenised rows.
        max_tokens: where responses are cut.
        counts: what became of the rows, None where they are not here.
        overlaps: fingerprint of a benchmark's prompts → those that occur in the rows, None where that was not checked.
    """

    __pydantic_config__ = _CONFIG
    fingerprint: Print
    max_tokens: Count
    counts: RowCounts | None
    overlaps: dict[Print, list[Overlap] | None]


@dataclass(frozen=True)
class MetricRecord:
    """A metric beside ROUGE-L: its name, a sentence on how to read it, and a fingerprint of how it is measured."""

    __pydantic_config__ = _CONFIG
    name: Text
    note: Text
    conditions: Print


@dataclass(frozen=True)
class ExperimentRecord:
    """An experiment.

    Attributes:
        name, description: its own.
        label: what tells it from others of the same name.
        fingerprint: of its comparison.
        fair: whether all of its methods have the same α and budget.
        budget: that of its methods, in words.
        metrics: beside ROUGE-L.
        published: the paper's scores that its settings allow to be put beside its own.
        written: code and machine that made its comparison.
    """

    __pydantic_config__ = _CONFIG
    name: ExperimentName
    label: Text
    description: Text
    fingerprint: Print
    fair: bool
    budget: Text
    metrics: list[MetricRecord]
    published: list[Score]
    written: dict[Text, Text] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What is recorded of one or more experiments, without single generations.

    Attributes:
        experiments: at least one.
        trials: at least one; those of a row differ in their training seed alone.
        data: training data of the trials.
        baseline: row that the others are compared with, None if nothing was trained.
        missing_baseline: row that was asked for and is not there.
    """

    __pydantic_config__ = _CONFIG
    experiments: list[ExperimentRecord]
    trials: list[TrialRecord]
    data: list[DataRecord]
    baseline: Text | None
    missing_baseline: Text | None = None

    @property
    def merged(self) -> bool:
        """Whether they are of several experiments."""
        return len(self.experiments) > 1

    @property
    def rows(self) -> dict[str, list[TrialRecord]]:
        """Row → its trials, in the order of the table."""
        rows: dict[str, list[TrialRecord]] = {}
        for trial in self.trials:
            rows.setdefault(trial.row, []).append(trial)
        return rows

    @property
    def protocols(self) -> dict[str, dict[str, EvaluationRecord]]:
        """Benchmark → protocol hash → an evaluation by it."""
        found: dict[str, dict[str, EvaluationRecord]] = {}
        for trial in self.trials:
            for own in trial.evaluations:
                found.setdefault(own.benchmark, {}).setdefault(own.protocol_hash, own)
        return found

    @property
    def mixed(self) -> list[str]:
        """Benchmarks on which experiments follow several protocols; a sweep that varies a protocol mixes none."""
        return [name for name, found in self.protocols.items() if len(found) > 1] if self.merged else []

    @property
    def common(self) -> list[str]:
        """Benchmarks that every row has: the average is over them."""
        return [name for name in self.protocols if all(name in trial.by_benchmark for trial in self.trials)]

    def labels(self, origins: list[str]) -> str:
        """The experiments in words."""
        return ", ".join(own.label for own in self.experiments if own.fingerprint in origins)


@dataclass(frozen=True)
class Prompt:
    """A prompt and its acceptable responses."""

    text: str
    references: list[str]


@dataclass(frozen=True, eq=False)
class Generations:
    """What was generated.

    Attributes:
        tables: evaluation → a row per prompt × decoding seed: id, seed, rouge_l, exact_match and prediction, which is null
            but under the first decoding seed of one training seed of each row.
        prompts: prompts' fingerprint → id → prompt, of everything that has a prediction.
    """

    tables: Mapping[str, pa.Table]
    prompts: Mapping[str, Mapping[str, Prompt]]

    def answers(self, evaluation: EvaluationRecord, ids: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Prompt id → its row, for the rows that have a prediction; of these prompts alone, or of all."""
        table = self.tables[evaluation.fingerprint]
        chosen = pc.is_valid(table["prediction"])
        if ids is not None:
            chosen = pc.and_(chosen, pc.is_in(table["id"], pa.array(ids, pa.string())))
        return {row["id"]: row for row in table.filter(chosen).to_pylist()}


@dataclass(frozen=True, eq=False)
class Records:
    """Everything that a report is made from."""

    facts: Facts
    generations: Generations


def run_scores(facts: Facts) -> list[RunScores]:
    """The scores behind the tables.

    Raises:
        ValueError: an evaluation is only planned.
    """
    found = []
    for trial in facts.trials:
        for own in trial.evaluations:
            if own.measured is None:
                raise ValueError(f"{own.label} has no scores")
            found.append(RunScores(trial.row, trial.seed, own.benchmark, own.measured.per_seed))
    return found
