"""The whole experiment: one frozen model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError, model_validator

from pipeline.config.base import ExperimentName, Name, Strict
from pipeline.config.data import Benchmark, DataConfig
from pipeline.config.methods import (
    METHOD_KINDS,
    CacheConfig,
    Evaluation,
    MethodConfig,
    SeqKd,
    Sft,
    Training,
    Validation,
)
from pipeline.config.models import ModelRef, StudentConfig

MAX_EVALUATIONS = 10_000
"""Every one is planned before anything runs."""


class TeacherFinetune(Strict):
    """Supervised fine-tuning of the teacher on the training rows, before anything uses it (as the paper's teachers were)."""

    train: Training
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _one_teacher(self) -> TeacherFinetune:
        if len(self.train.seeds) != 1:
            raise ValueError(f"train.seeds {self.train.seeds}: there is one teacher; give exactly one seed")
        _check_search(self.train, self.validation)
        if self.train.lora is not None and not self.train.lora.save_merged:
            raise ValueError(
                "train.lora.save_merged is false, but everything after this reads the tuned teacher as a whole; set it to true"
            )
        return self


class Tracking(Strict):
    """What goes to the tracking store besides figures. Changes no result and no fingerprint."""

    log_models: bool = True
    """Log every trained student as an MLflow model of its run: with the store in the run directory by hard links, which take
    no room; a server is sent the weights, so set it to false where that is too much. `distilllens register` logs the one that
    it chooses either way."""


class Experiment(Strict):
    """One experiment: a teacher, a student, rows, methods and benchmarks."""

    name: ExperimentName
    """Folder under the run directory and MLflow experiment."""
    description: str = ""
    teacher: ModelRef
    teacher_finetune: TeacherFinetune | None = None
    """Fine-tune the teacher first; everything after that uses the result. null takes it as it is."""
    tokenizer: ModelRef | None = None
    """null takes the teacher's."""
    student: StudentConfig
    data: DataConfig
    benchmarks: dict[Name, Benchmark] = Field(min_length=1, max_length=100)
    """Name → test set; null leaves out one that an included file names."""
    methods: dict[Name, MethodConfig] = Field(min_length=1, max_length=100)
    """Name → method. A name that is a method's own needs no `kind`."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """α, the weight of the teacher's terms against the cross-entropy on references; the paper's DistillLens has 1."""
    fair: bool = True
    """Give every method the same α and budget; false lets each set its own, and the comparison lists the differences."""
    baseline: str | None = None
    """Method that the report compares the others with; null takes kd if it is there, else the first method."""
    train: Training
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()
    cache: CacheConfig = CacheConfig()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _fill_and_drop(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        benchmarks = value.get("benchmarks")
        if isinstance(benchmarks, dict):
            value = {**value, "benchmarks": {name: item for name, item in benchmarks.items() if item is not None}}
        methods = value.get("methods")
        if not isinstance(methods, dict):
            return value
        filled: dict[Any, Any] = {}
        for name, method in methods.items():
            body = {} if method is None else method
            if isinstance(body, dict) and "kind" not in body and name in METHOD_KINDS:
                body = {"kind": name, **body}
            filled[name] = body
        return {**value, "methods": filled}

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        evaluations = len(self.methods) * len(self.train.seeds) * len(self.benchmarks)
        if evaluations > MAX_EVALUATIONS:
            raise ValueError(
                f"{len(self.methods)} methods × {len(self.train.seeds)} seeds × {len(self.benchmarks)} benchmarks are "
                f"{evaluations} evaluations, but one experiment has at most {MAX_EVALUATIONS}; lower one of them"
            )
        reserved = {"teacher", "untrained"} & set(self.methods)
        if reserved:
            raise ValueError(f"methods: {sorted(reserved)} are names of rows that every table has; choose another name")
        if self.fair:
            own = [name for name, method in self.methods.items() if getattr(method, "alpha", None) not in (None, self.alpha)]
            if own:
                raise ValueError(
                    f"methods.{own[0]}.alpha differs from alpha={self.alpha}, but fair: true gives every method the same; "
                    "remove it, or set fair: false"
                )
            own = [name for name, method in self.methods.items() if method.train is not None]
            if own:
                raise ValueError(
                    f"methods.{own[0]}.train sets a budget of its own, but fair: true gives every method that of train; "
                    "remove it, or set fair: false"
                )
        for name in self.methods:
            _check_search(self.training_of(name), self.validation)
        if self.baseline is not None and self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is no method; name one of {', '.join(self.methods)}, or remove it")
        self._on_policy_is_online()
        self._evaluation_is_read()
        held_out = [source for source in self._sources() if getattr(source, "part", None)]
        for source in held_out:
            if getattr(self.data.held_out, source.part) == 0:
                raise ValueError(
                    f"data.held_out.{source.part} is 0, but a source of kind held_out asks for that part; set its size"
                )
        return self

    def _on_policy_is_online(self) -> None:
        for name, method in self.methods.items():
            if isinstance(method, Sft | SeqKd) or method.on_policy is None:
                continue
            if self.cache.enabled:
                raise ValueError(
                    f"methods.{name}.on_policy trains on rows that are sampled while it trains, so cache.enabled: true cannot "
                    "hold the teacher's states of them; set cache.enabled: false, or remove on_policy"
                )
            if self.alpha_of(name) < 1:
                raise ValueError(
                    f"methods.{name}.on_policy goes with alpha 1, here it is {self.alpha_of(name):g}: the cross-entropy would "
                    "teach the student its own samples; set alpha to 1, or remove on_policy"
                )

    def _evaluation_is_read(self) -> None:
        """A setting that every benchmark overrides would be read by none."""
        for name in ("decoding", "seeds"):
            given, own = getattr(self.evaluation, name), [getattr(benchmark, name) for benchmark in self.benchmarks.values()]
            if given != getattr(Evaluation(), name) and all(value is not None and value != given for value in own):
                first = next(iter(self.benchmarks))
                raise ValueError(
                    f"evaluation.{name} is given, but every benchmark has {name} of its own; set benchmarks.{first}.{name} "
                    "(null takes evaluation's) and that of the others, or remove it"
                )

    def alpha_of(self, method: str) -> float:
        """α of a method: its own, or the experiment's; 0 for methods whose objective has no teacher."""
        config = self.methods[method]
        if isinstance(config, Sft | SeqKd):
            return 0.0
        return self.alpha if config.alpha is None else config.alpha

    def training_of(self, method: str) -> Training:
        """The budget of a method: the experiment's, or with `fair: false` the method's own settings over it."""
        try:
            return self.train.overridden(self.methods[method].train)
        except ValidationError as error:
            reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise ValueError(f"methods.{method}.train: together with train, {reason}") from None

    def _sources(self) -> list[Any]:
        return [self.data.dev, *(benchmark.source for benchmark in self.benchmarks.values())]


def _check_search(training: Training, validation: Validation) -> None:
    if len(training.learning_rates) > 1 and validation.select == "last":
        raise ValueError(
            f"train.learning_rate {training.learning_rates} is a search, but validation.select: last compares nothing; "
            "set it to loss or rouge_l, or give one learning rate"
        )
