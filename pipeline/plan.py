"""An experiment as a list of artifacts: every fingerprint is known before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from pipeline.artifacts import write_text_atomically
from pipeline.config.experiment import Experiment
from pipeline.config.methods import SeqKd
from pipeline.errors import DataError
from pipeline.models.lens import check_same_tokens, check_vocabulary_sizes
from pipeline.models.load import has_tokenizer, load_tokenizer
from pipeline.stages import (
    cache,
    compare,
    evaluate,
    finetune_teacher,
    import_model,
    lens_profile,
    measure,
    prepare,
    seqkd,
    student,
    train,
)
from pipeline.stages.cache import CachePlan
from pipeline.stages.compare import ComparePlan, Trial
from pipeline.stages.finetune_teacher import FinetunePlan
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.objectives import layers_to_cache, reads_all_positions
from pipeline.stages.place import Place
from pipeline.stages.prepare import BenchmarkPlan, TrainingDataPlan
from pipeline.stages.seqkd import SeqKdPlan
from pipeline.stages.student import StudentPlan
from pipeline.stages.train import Inputs, TrainPlan


@dataclass(frozen=True)
class Plan:
    """Everything that an experiment makes, in the order in which it is made.

    Attributes:
        experiment: the configuration.
        run_dir: where artifacts, the tracking store and the comparison go.
        models: the teacher, and the tokenizer's and the student's own model where they differ.
        data, benchmarks: tokenised rows.
        finetune: the teacher's fine-tuning, None where it is used as it comes.
        student: the untrained student.
        cache: the teacher's states, None where no method reads a cache.
        generations: the teacher's responses that methods train on.
        trials: rows of the comparison; the teacher and the untrained student come first.
        comparison: the end.
    """

    experiment: Experiment
    run_dir: Path
    models: tuple[ModelPlan, ...]
    data: TrainingDataPlan
    benchmarks: tuple[BenchmarkPlan, ...]
    finetune: FinetunePlan | None
    student: StudentPlan
    cache: CachePlan | None
    generations: tuple[SeqKdPlan, ...]
    trials: tuple[Trial, ...]
    comparison: ComparePlan

    def places(self) -> Iterator[Place]:
        """Every artifact in order."""
        yield from (model.place for model in self.models if model.place is not None)
        yield self.data.place
        yield from (benchmark.place for benchmark in self.benchmarks)
        if self.finetune is not None:
            yield self.finetune.place
        yield self.student.place
        if self.cache is not None:
            yield self.cache.place
        yield from (plan.place for plan in self.generations)
        for trial in self.trials:
            if trial.train is not None:
                yield trial.train.place
            yield from (plan.place for plan in trial.evaluations)
            yield from (plan.place for plan in trial.metrics)
            if trial.profile is not None:
                yield trial.profile.place
        yield self.comparison.place

    @property
    def config_path(self) -> Path:
        """Where the experiment is written down as it runs, with includes and overrides applied."""
        return self.run_dir / self.experiment.name / "config.yaml"

    def write_config(self) -> None:
        """Write it."""
        write_config(self.config_path, self.experiment)

    def finished(self) -> bool:
        """Whether the comparison of exactly this plan is there."""
        return self.comparison.finished()


def write_config(path: Path, experiment: Experiment) -> None:
    """Write an experiment down as it runs, with includes and overrides applied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))


def plan_experiment(experiment: Experiment, run_dir: Path) -> Plan:
    """Resolve every reference of an experiment and compute every fingerprint.

    Raises:
        ConfigError, DataError, ModelError: a reference does not resolve, or settings do not fit together.
    """
    root = run_dir / "artifacts"
    base = import_model.plan_model(experiment.teacher, root, "teacher")
    tokenizer = import_model.plan_model(experiment.tokenizer, root, "tokenizer") if experiment.tokenizer else base
    data = prepare.plan_training_data(experiment.data, tokenizer, root)
    tuning = experiment.teacher_finetune
    finetune = finetune_teacher.plan_finetuning(tuning, base, data, root) if tuning else None
    teacher = finetune.teacher if finetune else base
    benchmarks = tuple(
        prepare.plan_benchmark(name, benchmark, experiment.data, tokenizer, root)
        for name, benchmark in experiment.benchmarks.items()
    )
    initial = student.plan_student(experiment.student, teacher, data, root)
    generations = {
        name: seqkd.plan_generation(method.generation, teacher, data, root)
        for name, method in experiment.methods.items()
        if isinstance(method, SeqKd)
    }
    runs = [(method, seed) for method in experiment.methods for seed in experiment.train.seeds]
    inputs = Inputs(data, initial, teacher, None, generations)
    online = [train.plan_training(experiment, method, seed, inputs, root) for method, seed in runs]
    states = _plan_cache(experiment, online, teacher, data, root)
    inputs = replace(inputs, cache=states)
    trained = [train.plan_training(experiment, method, seed, inputs, root) for method, seed in runs]

    def trial(method: str, seed: int | None, subject: evaluate.Subject, training: TrainPlan | None) -> Trial:
        label = method if seed is None else f"{method} s{seed}"
        settings, limit = experiment.evaluation, experiment.data.max_tokens
        plans = tuple(evaluate.plan_evaluation(subject, label, benchmark, settings, root) for benchmark in benchmarks)
        metrics = [
            metric for plan in plans for metric in measure.plan_metrics(settings.metrics, label, plan, teacher, limit, root)
        ]
        profile = None
        if not isinstance(subject, ModelPlan):
            profile = lens_profile.plan_profile(experiment, label, subject, initial, teacher, data, root)
        return Trial(method, seed, training, plans, tuple(metrics), profile)

    trials = (
        trial("teacher", None, teacher, None),
        trial("untrained", None, initial, None),
        *(trial(method, seed, plan, plan) for (method, seed), plan in zip(runs, trained, strict=True)),
    )
    models = tuple({model.digest: model for model in (base, tokenizer, initial.own) if model is not None}.values())
    comparison = compare.plan_comparison(experiment, trials, root, run_dir)
    written = tuple({plan.place.fingerprint: plan for plan in generations.values()}.values())
    return Plan(experiment, run_dir, models, data, benchmarks, finetune, initial, states, written, trials, comparison)


def _plan_cache(
    experiment: Experiment, runs: list[TrainPlan], teacher: ModelPlan, data: TrainingDataPlan, root: Path
) -> CachePlan | None:
    """One cache with the layers of every method that can read one."""
    if not experiment.cache.enabled:
        return None
    layers: set[int] = set()
    for run in runs:
        if run.alpha > 0 and not reads_all_positions(run.config):
            layers |= layers_to_cache(run.as_method())
    if not layers:
        return None
    return cache.plan_cache(experiment.cache, tuple(sorted(layers | set(experiment.cache.extra_layers))), teacher, data, root)


def check_inputs(plan: Plan) -> None:
    """Read every row and compare sizes before any work starts, so that bad input leaves nothing half-written.

    Raises:
        DataError: a file is malformed or empty, or has fewer rows than a batch.
        ConfigError: the evaluation's engine cannot run here.
        ModelError: teacher and student have different vocabularies or tokenizers.
    """
    if plan.data.place.existing() is None:
        rows = plan.data.train.count()
        plan.data.dev.count()
        for where, size in _batch_sizes(plan.experiment).items():
            if size > rows:
                raise DataError(f"{where}: {size} rows, but data.train has only {rows}; lower it")
    for benchmark in plan.benchmarks:
        if benchmark.place.existing() is None:
            benchmark.rows.count()
    for trial in plan.trials:
        for evaluation in trial.evaluations:
            evaluate.check_engine(evaluation)
    student, tokenizer = plan.student.own, plan.data.tokenizer
    if student is not None and tokenizer.place is None:
        tokens = load_tokenizer(tokenizer.folder())
        check_vocabulary_sizes(plan.models[0].config().vocab_size, student.config().vocab_size, len(tokens))
        if student.place is None and has_tokenizer(student.folder()):
            check_same_tokens(tokens.get_vocab(), load_tokenizer(student.folder()).get_vocab())


def _batch_sizes(experiment: Experiment) -> dict[str, int]:
    """Dotted path → rows of a batch, for every training."""
    sizes = {"train.batch_size": experiment.train.batch_size}
    for name, method in experiment.methods.items():
        if method.train is not None:
            sizes[f"methods.{name}.train.batch_size"] = experiment.training_of(name).batch_size
    if experiment.teacher_finetune is not None:
        sizes["teacher_finetune.train.batch_size"] = experiment.teacher_finetune.train.batch_size
    return sizes
