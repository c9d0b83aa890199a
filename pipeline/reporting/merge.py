"""The records of several experiments in one: what is the same is shown once, what differs is told apart.

Two rows of different experiments become one row where they are the same checkpoints by their fingerprints, or where
everything but the training seed is equal: settings, inputs, prompts and protocols. All other rows stay apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import ArtifactError, ConfigError
from pipeline.reporting.record import (
    DataRecord,
    EvaluationRecord,
    ExperimentRecord,
    Facts,
    Generations,
    Prompt,
    Records,
    TrialRecord,
)
from pipeline.tracking import flatten


@dataclass(frozen=True)
class _Row:
    """Trials that differ in their training seed alone."""

    trials: tuple[TrialRecord, ...]

    @property
    def family(self) -> str:
        first = self.trials[0]
        return first.model if first.training is None else first.training.family

    @property
    def checkpoints(self) -> set[str]:
        return {trial.model for trial in self.trials}

    @property
    def conditions(self) -> dict[str, str]:
        """Benchmark → of its evaluation without the model."""
        return {own.benchmark: own.conditions for trial in self.trials for own in trial.evaluations}

    @property
    def origins(self) -> list[str]:
        return list(dict.fromkeys(origin for trial in self.trials for origin in trial.origins))

    def belongs_to(self, other: _Row) -> bool:
        """Whether both are one row."""
        if self.family != other.family:
            return False
        if self.conditions == other.conditions:
            return True
        shared = self.conditions.keys() & other.conditions.keys()
        agree = all(self.conditions[name] == other.conditions[name] for name in shared)
        return self.checkpoints == other.checkpoints and agree


def merge(sources: Sequence[Records], baseline: str | None = None, mix_protocols: bool = False) -> Records:
    """Put experiments together.

    Args:
        sources: at least one; the first ones' rows come first.
        baseline: row or method that the others are compared with; None takes the first source's.
        mix_protocols: allow a benchmark to have several protocols.

    Raises:
        ConfigError: sources are the same comparison; the baseline is no row, or is several.
        ArtifactError: protocols of a benchmark differ.
    """
    experiments = _experiments(sources)
    if len(sources) > 1 and len(experiments) == 1:
        raise ConfigError(f"compare: all arguments are the comparison {experiments[0].fingerprint}; give different experiments")
    experiments, renamed = _told_apart(experiments)
    rows: list[_Row] = []
    for source in sources:
        rows = _joined(rows, [_Row(tuple(_renamed(trial, renamed) for trial in own)) for own in source.facts.rows.values()])
    names = _names(rows, experiments)
    trials = [replace(trial, row=name) for row, name in zip(rows, names, strict=True) for trial in row.trials]
    trials.sort(key=lambda trial: trial.training is not None)  # models that were not trained here come first, as everywhere
    facts = Facts(experiments, trials, _data(sources), None)
    if facts.mixed and not mix_protocols:
        differing = "\n".join(f"  - {line}" for line in _mixing(facts))
        raise ArtifactError(
            "compare: scores by different protocols do not compare; give --mix-protocols to put them side by side anyway\n"
            f"{differing}"
        )
    first = sources[0].facts
    # The first source's rows are first in `rows`, in its order.
    default = None if first.baseline is None else names[list(first.rows).index(first.baseline)]
    missing = first.missing_baseline if len(sources) == 1 and baseline is None else None
    against = default if baseline is None else _row_of(baseline, facts)
    return Records(replace(facts, baseline=against or _first_trained(facts), missing_baseline=missing), _generations(sources))


def _experiments(sources: Sequence[Records]) -> list[ExperimentRecord]:
    found: dict[str, ExperimentRecord] = {}
    for own in (own for source in sources for own in source.facts.experiments):
        found.setdefault(own.fingerprint, own)
    return list(found.values())


def _told_apart(experiments: Sequence[ExperimentRecord]) -> tuple[list[ExperimentRecord], dict[tuple[str, str], str]]:
    """Experiments of one name numbered, metrics of one name that are measured in several ways named by their experiment.

    Returns:
        The experiments, and (experiment, metric) → its new name.
    """
    names = [own.name for own in experiments]
    labelled = [
        replace(own, label=own.name if names.count(own.name) == 1 else f"{own.name} {names[: at + 1].count(own.name)}")
        for at, own in enumerate(experiments)
    ]
    ways: dict[str, dict[str, str]] = {}
    for own in labelled:
        for metric in own.metrics:
            ways.setdefault(metric.name, {}).setdefault(metric.conditions, own.label)
    renamed = {
        (own.fingerprint, metric.name): f"{metric.name} ({ways[metric.name][metric.conditions]})"
        for own in labelled
        for metric in own.metrics
        if len(ways[metric.name]) > 1
    }
    for at, own in enumerate(labelled):
        metrics = [replace(metric, name=renamed.get((own.fingerprint, metric.name), metric.name)) for metric in own.metrics]
        labelled[at] = replace(own, metrics=metrics)
    return labelled, renamed


def _renamed(trial: TrialRecord, names: dict[tuple[str, str], str]) -> TrialRecord:
    """The trial with the new names of its metrics."""

    def new(metric: str) -> str:
        return next((names[origin, metric] for origin in trial.origins if (origin, metric) in names), metric)

    evaluations = []
    for own in trial.evaluations:
        assert own.measured is not None  # records that are read have scores
        per_seed = {new(metric): values for metric, values in own.measured.per_seed.items()}
        evaluations.append(replace(own, measured=replace(own.measured, per_seed=per_seed)))
    return replace(trial, evaluations=evaluations)


def _joined(rows: Sequence[_Row], others: Iterable[_Row]) -> list[_Row]:
    """Add the rows of another source, each to the row that it belongs to, of which there is one for it at most."""
    joined, free = list(rows), set(range(len(rows)))
    for other in others:
        at = next((index for index in sorted(free) if other.belongs_to(joined[index])), None)
        if at is None:
            joined.append(other)
        else:
            free.discard(at)
            joined[at] = _together(joined[at], other)
    return joined


def _together(row: _Row, other: _Row) -> _Row:
    """All trials of both, identical ones once; the first one stays first, as its texts are at hand."""
    trials = {trial.model: trial for trial in row.trials}
    for trial in other.trials:
        known = trials.get(trial.model)
        trials[trial.model] = trial if known is None else _united(known, trial)
    return _Row(tuple(trials.values()))


def _united(trial: TrialRecord, other: TrialRecord) -> TrialRecord:
    """One checkpoint with what was measured of it in both."""
    evaluations = trial.by_benchmark
    for name, own in other.by_benchmark.items():
        evaluations[name] = _with_metrics(evaluations[name], own) if name in evaluations else own
    return replace(
        trial, origins=list(dict.fromkeys([*trial.origins, *other.origins])), evaluations=list(evaluations.values()),
        profile=trial.profile or other.profile, heat=trial.heat or other.heat,
    )  # fmt: skip


def _with_metrics(own: EvaluationRecord, other: EvaluationRecord) -> EvaluationRecord:
    assert own.measured is not None and other.measured is not None  # records that are read have scores
    measured = replace(own.measured, per_seed={**other.measured.per_seed, **own.measured.per_seed})
    return replace(own, measured=measured)


def _names(rows: Sequence[_Row], experiments: Sequence[ExperimentRecord]) -> list[str]:
    """The rows' names, which say their experiments where rows of one name differ."""
    names, labels = [row.trials[0].own_row for row in rows], {own.fingerprint: own.label for own in experiments}
    return [
        name if names.count(name) == 1 else f"{name} ({', '.join(labels[origin] for origin in row.origins)})"
        for row, name in zip(rows, names, strict=True)
    ]


def _first_trained(facts: Facts) -> str | None:
    return next((trial.row for trial in facts.trials if trial.training is not None), None)


def _row_of(asked: str, facts: Facts) -> str:
    """The row of that name, or of the method of that name."""
    rows = facts.rows
    found = [asked] if asked in rows else [row for row, trials in rows.items() if trials[0].method == asked]
    if len(found) != 1:
        raise ConfigError(
            f"--baseline: {asked!r} is {'several rows' if found else 'no row'}; choose one of {', '.join(found or rows)}"
        )
    return found[0]


def _mixing(facts: Facts) -> list[str]:
    """A line for each benchmark with several protocols: their hashes and where they differ."""
    lines = []
    for name in facts.mixed:
        protocols = facts.protocols[name]
        users = {
            found: facts.labels([o for trial in facts.trials for o in trial.origins if _follows(trial, name, found)])
            for found in protocols
        }
        flat = {found: flatten(own.protocol) for found, own in protocols.items()}
        fields = [field for field in dict.fromkeys(f for own in flat.values() for f in own) if _differs(field, flat.values())]
        differing = "; ".join(f"{field}: {' / '.join(json.dumps(own.get(field)) for own in flat.values())}" for field in fields)
        hashes = " and ".join(f"{found} ({own})" for found, own in users.items())
        lines.append(f"{name}: {hashes}, which differ in {differing}")
    return lines


def _follows(trial: TrialRecord, benchmark: str, protocol: str) -> bool:
    return benchmark in trial.by_benchmark and trial.by_benchmark[benchmark].protocol_hash == protocol


def _differs(field: str, protocols: Iterable[dict[str, object]]) -> bool:
    return len({json.dumps(own.get(field), sort_keys=True) for own in protocols}) > 1


def _data(sources: Sequence[Records]) -> list[DataRecord]:
    """Each training data set once, with everything that any source knows of it."""
    found: dict[str, DataRecord] = {}
    for data in (own for source in sources for own in source.facts.data):
        known = found.setdefault(data.fingerprint, data)
        checked = {name: overlaps for name, overlaps in data.overlaps.items() if overlaps is not None}
        counts = known.counts or data.counts
        found[data.fingerprint] = replace(known, counts=counts, overlaps={**data.overlaps, **known.overlaps, **checked})
    return list(found.values())


def _generations(sources: Sequence[Records]) -> Generations:
    tables: dict[str, pa.Table] = {}
    prompts: dict[str, dict[str, Prompt]] = {}
    for source in reversed(sources):  # what the first has counts
        tables |= source.generations.tables
        for name, own in source.generations.prompts.items():
            prompts[name] = {**prompts.get(name, {}), **own}
    return Generations(tables, prompts)
