"""Records of made-up experiments, for tests of what is done with records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.artifacts import text_digest
from pipeline.reporting.record import (
    DATA,
    DataRecord,
    EvaluationRecord,
    ExperimentRecord,
    Facts,
    Generations,
    InputRecord,
    Measured,
    MetricRecord,
    Prompt,
    Records,
    RowCounts,
    TrainingRecord,
    TrainingRun,
    TrialRecord,
)
from pipeline.reporting.record_files import SCORED

DECODING = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "no_repeat_ngram_size": 0}
SCORES = (10.0, 20.0, 30.0, 45.0)


def protocol(benchmark: str, **decoding: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "decoding": {**DECODING, **decoding}, "seeds": [1], "engine": "transformers"}


def digest(*parts: object) -> str:
    return text_digest(repr(parts))[:16]


def evaluation(
    model: str, benchmark: str, scores: Sequence[float] = SCORES, asked: Mapping[str, Any] | None = None, **metrics: float
) -> tuple[EvaluationRecord, pa.Table]:
    """Prompts p0, p1, …, one decoding seed."""
    followed = dict(asked or protocol(benchmark))
    conditions = digest(followed, len(scores))
    measured = Measured(len(scores), 0.5, {"rouge_l": [sum(scores) / len(scores)], **{k: [v] for k, v in metrics.items()}})
    record = EvaluationRecord(
        benchmark, f"evaluate {model} on {benchmark}", digest(model, conditions), conditions, digest(benchmark, len(scores)),
        followed, measured,
    )  # fmt: skip
    rows = [(f"p{at}", 1, score, 0.0, f"{model} says {score:g}") for at, score in enumerate(scores)]
    return record, pa.Table.from_pylist([dict(zip(SCORED.names, row, strict=True)) for row in rows], schema=SCORED)


def training(method: str, seed: int, data: str = "data", teacher: str = "t", **settings: Any) -> TrainingRecord:
    family = digest(method, data, teacher, settings)
    inputs = [
        InputRecord(what, f"{own} name", what, own) for what, own in ((DATA, data), ("student", "s"), ("teacher", teacher))
    ]
    run = TrainingRun(2.0, 3, 100, 0.5, 3, 1e-3, {"torch": "2"}, {"dev/loss": [(1, 2.0), (3, 1.0)]})
    return TrainingRecord(
        f"train {method} s{seed}", digest(family, seed), family, {"kind": method, **settings}, False, False, inputs, True, run
    )


def records(
    name: str,
    rows: Mapping[str, Sequence[int | None]],
    benchmarks: Mapping[str, Mapping[str, Any] | None] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    metrics: Mapping[str, str] | None = None,
    budget: str = "3 steps",
    **training_changes: Any,
) -> Records:
    """An experiment.

    Args:
        name: of the experiment.
        rows: row → its training seeds; None for a model that was not trained.
        benchmarks: name → protocol, None for the usual one.
        scores: row → of each prompt.
        metrics: further metric → how it is measured.
        budget: of its methods.
        training_changes: see `training`.
    """
    origin = digest("comparison", name, dict(rows), benchmarks, training_changes, metrics)
    trials, tables, prompts = [], {}, {}
    for row, seeds in rows.items():
        for seed in seeds:
            made = None if seed is None else training(row, seed, **training_changes)
            model = row if made is None else made.fingerprint
            own = []
            for benchmark, asked in (benchmarks or {"general": None}).items():
                found, table = evaluation(
                    model, benchmark, (scores or {}).get(row, SCORES), asked, **dict.fromkeys(metrics or {}, 5.0)
                )
                if seed != seeds[0]:
                    table = table.set_column(4, "prediction", pa.nulls(len(table), pa.string()))
                own.append(found)
                tables[found.fingerprint] = table
                prompts[found.prompts] = {f"p{at}": Prompt(f"{benchmark} {at}?", ["yes"]) for at in range(len(table))}
            trials.append(TrialRecord(row, "", seed, row, [origin], model, made, own))
    data = {
        trial.training.data: DataRecord(
            trial.training.data, 512, RowCounts(24, 20, 1, 4), {own.prompts: [] for own in trial.evaluations}
        )
        for trial in trials
        if trial.training is not None
    }
    noted = [MetricRecord(metric, f"measured by {way}.", way) for metric, way in (metrics or {}).items()]
    experiment = ExperimentRecord(name, name, f"About {name}.", origin, True, budget, noted, [], {"git commit": f"of {name}"})
    baseline = next((trial.row for trial in trials if trial.training is not None), None)
    return Records(Facts([experiment], trials, list(data.values()), baseline), Generations(tables, prompts))


def changed(own: Records, **changes: Any) -> Records:
    """With other facts."""
    return replace(own, facts=replace(own.facts, **changes))
