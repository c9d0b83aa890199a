"""The whole experiment: one frozen model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipeline.config.base import Strict
from pipeline.config.data import Benchmark, DataConfig
from pipeline.config.methods import METHOD_KINDS, CacheConfig, Evaluation, MethodConfig, Training, Validation
from pipeline.config.models import ModelRef, StudentConfig


class Experiment(Strict):
    """One experiment: a teacher, a student, rows, methods and benchmarks."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Folder under the run directory and MLflow experiment."""
    description: str = ""
    teacher: ModelRef
    tokenizer: ModelRef | None = None
    """null takes the teacher's."""
    student: StudentConfig
    data: DataConfig
    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    """Name → test set; null leaves out one that an included file names."""
    methods: dict[str, MethodConfig] = Field(min_length=1)
    """Name → method. A name that is a method's own needs no `kind`."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """α, the weight of the teacher's terms against the cross-entropy on references; the paper's DistillLens has 1."""
    fair: bool = True
    """Give every method the same α; false lets each method set its own, and the comparison lists the differences."""
    train: Training
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()
    cache: CacheConfig = CacheConfig()

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
        held_out = [source for source in self._sources() if getattr(source, "part", None)]
        for source in held_out:
            if getattr(self.data.held_out, source.part) == 0:
                raise ValueError(
                    f"data.held_out.{source.part} is 0, but a source of kind held_out asks for that part; set its size"
                )
        return self

    def _sources(self) -> list[Any]:
        return [self.data.dev, *(benchmark.source for benchmark in self.benchmarks.values())]
