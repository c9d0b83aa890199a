"""An experiment as a list of artifacts: every fingerprint is known before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.artifacts import write_text_atomically
from pipeline.config.experiment import Experiment
from pipeline.errors import ArtifactError, DataError
from pipeline.models.lens import check_vocabulary_sizes
from pipeline.models.load import load_tokenizer
from pipeline.stages import cache, compare, evaluate, import_model, prepare, student, train
from pipeline.stages.cache import CachePlan
from pipeline.stages.compare import ComparePlan, Trial
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place
from pipeline.stages.prepare import BenchmarkPlan, TrainingDataPlan
from pipeline.stages.student import StudentPlan
from pipeline.stages.train import TrainPlan


@dataclass(frozen=True)
class Plan:
    """Everything that an experiment makes, in the order in which it is made.

    Attributes:
        experiment: the configuration.
        run_dir: where artifacts, the tracking store and the comparison go.
        models: the teacher, and the tokenizer's and the student's own model where they differ.
        data, benchmarks: tokenised rows.
        student: the untrained student.
        cache: the teacher's states, None where no method reads a cache.
        trials: rows of the comparison; the teacher and the untrained student come first.
        comparison: the end.
    """

    experiment: Experiment
    run_dir: Path
    models: tuple[ModelPlan, ...]
    data: TrainingDataPlan
    benchmarks: tuple[BenchmarkPlan, ...]
    student: StudentPlan
    cache: CachePlan | None
    trials: tuple[Trial, ...]
    comparison: ComparePlan

    def places(self) -> Iterator[Place]:
        """Every artifact in order."""
        yield from (model.place for model in self.models if model.place is not None)
        yield self.data.place
        yield from (benchmark.place for benchmark in self.benchmarks)
        yield self.student.place
        if self.cache is not None:
            yield self.cache.place
        for trial in self.trials:
            if trial.train is not None:
                yield trial.train.place
            yield from (plan.place for plan in trial.evaluations)
        yield self.comparison.place

    @property
    def config_path(self) -> Path:
        """Where the experiment is written down as it runs, with includes and overrides applied."""
        return self.run_dir / self.experiment.name / "config.yaml"

    def write_config(self) -> None:
        """Write it."""
        self.config_path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.config_path, yaml.safe_dump(self.experiment.model_dump(mode="json"), sort_keys=False))

    def finished(self) -> bool:
        """Whether the comparison of exactly this plan is there."""
        try:
            return self.comparison.place.existing() is not None
        except ArtifactError:
            return False  # an older comparison is at its place, or a damaged one: it is rebuilt


def plan_experiment(experiment: Experiment, run_dir: Path) -> Plan:
    """Resolve every reference of an experiment and compute every fingerprint.

    Raises:
        ConfigError, DataError, ModelError: a reference does not resolve, or settings do not fit together.
    """
    root = run_dir / "artifacts"
    teacher = import_model.plan_model(experiment.teacher, root, "teacher")
    tokenizer = import_model.plan_model(experiment.tokenizer, root, "tokenizer") if experiment.tokenizer else teacher
    data = prepare.plan_training_data(experiment.data, tokenizer, root)
    benchmarks = tuple(
        prepare.plan_benchmark(name, benchmark, experiment.data, tokenizer, root)
        for name, benchmark in experiment.benchmarks.items()
    )
    initial = student.plan_student(experiment.student, teacher, data, root)
    runs = [(method, seed) for method in experiment.methods for seed in experiment.train.seeds]
    online = [train.plan_training(experiment, method, seed, data, initial, teacher, None, root) for method, seed in runs]
    states = _plan_cache(experiment, online, teacher, data, root)
    trained = [train.plan_training(experiment, method, seed, data, initial, teacher, states, root) for method, seed in runs]

    def trial(method: str, seed: int | None, subject: evaluate.Subject, training: TrainPlan | None) -> Trial:
        label = method if seed is None else f"{method} s{seed}"
        plans = (evaluate.plan_evaluation(subject, label, benchmark, experiment.evaluation, root) for benchmark in benchmarks)
        return Trial(method, seed, training, tuple(plans))

    trials = (
        trial("teacher", None, teacher, None),
        trial("untrained", None, initial, None),
        *(trial(method, seed, plan, plan) for (method, seed), plan in zip(runs, trained, strict=True)),
    )
    models = tuple({model.digest: model for model in (teacher, tokenizer, initial.own) if model is not None}.values())
    comparison = compare.plan_comparison(experiment, trials, root, run_dir)
    return Plan(experiment, run_dir, models, data, benchmarks, initial, states, trials, comparison)


def _plan_cache(
    experiment: Experiment, runs: list[TrainPlan], teacher: ModelPlan, data: TrainingDataPlan, root: Path
) -> CachePlan | None:
    """One cache with the layers of every method that can read one."""
    if not experiment.cache.enabled:
        return None
    last = teacher.config().num_hidden_layers
    layers: set[int] = set()
    for run in runs:
        if run.alpha > 0 and not train.reads_all_positions(run.config):
            layers |= set(train.layers_to_cache(run, last))
    if not layers:
        return None
    return cache.plan_cache(experiment.cache, tuple(sorted(layers | set(experiment.cache.extra_layers))), teacher, data, root)


def check_inputs(plan: Plan) -> None:
    """Read every row and compare sizes before any work starts, so that bad input leaves nothing half-written.

    Raises:
        DataError: a file is malformed or empty, or has fewer rows than a batch.
        ModelError: teacher and student have different vocabularies.
    """
    if plan.data.place.existing() is None:
        rows = len(plan.data.train.read())
        plan.data.dev.read()
        if plan.experiment.train.batch_size > rows:
            raise DataError(
                f"train.batch_size: {plan.experiment.train.batch_size} rows, but data.train has only {rows}; lower it"
            )
    for benchmark in plan.benchmarks:
        if benchmark.place.existing() is None:
            benchmark.rows.read()
    student, tokenizer = plan.student.own, plan.data.tokenizer
    if student is not None and tokenizer.place is None:
        size = len(load_tokenizer(tokenizer.folder()))
        check_vocabulary_sizes(plan.models[0].config().vocab_size, student.config().vocab_size, size)
