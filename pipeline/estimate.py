"""What a plan will cost, before it runs."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from pipeline.config.methods import Training
from pipeline.plan import Plan
from pipeline.stages import cache as cache_stage
from pipeline.stages.place import Place
from pipeline.stages.prepare import BenchmarkPlan, RowsPlan
from pipeline.teacher.cache.estimate import estimate_seconds
from pipeline.training.device import choose_device

_CHARACTERS_PER_TOKEN = 4.2
_TEMPLATE_TOKENS = 35


def plan_table(plan: Plan) -> Any:
    """The plan as a rich table: stage, what, fingerprint, cached or to do, tokens."""
    from rich.table import Table

    grid = Table(title=f"{plan.experiment.name}: plan", title_justify="left")
    for name in ("stage", "what", "fingerprint", "state"):
        grid.add_column(name)
    grid.add_column("tokens", justify="right")
    tokens = _tokens(plan)
    for place in plan.places():
        grid.add_row(place.stage, place.label, place.fingerprint, state_of(place), tokens.get(place.fingerprint, ""))
    grid.caption = "tokens: ≈ estimated from text length until the rows are tokenised; evaluations: at most"
    return grid


def cache_estimate(plan: Plan) -> str:
    """Bytes of the cache, teacher tokens and time of its capture.

    Raises:
        DataError: the rows cannot be read.
    """
    if plan.cache is None:
        return "this experiment needs no cache"
    rows, tokens, response = _training_rows(plan)
    needed = cache_stage.planned_bytes(plan.cache, rows, response)
    exact = "" if plan.data.place.existing() else "about "
    seconds = estimate_seconds(plan.cache.teacher.config(), tokens, rows, plan.cache.config.batch_size, choose_device())
    return (
        f"{plan.cache.place.label}: {exact}{needed / 2**20:.1f} MiB for {rows} rows, {response} response tokens, "
        f"{len(plan.cache.key.layers)} layers in {plan.cache.dtype}; {tokens} tokens through the teacher, "
        f"about {timedelta(seconds=math.ceil(seconds))} on this machine"
    )


def _tokens(plan: Plan) -> dict[str, str]:
    rows, tokens, _ = _training_rows(plan)
    mark = "" if plan.data.place.existing() else "≈ "
    found = {plan.data.place.fingerprint: f"{mark}{tokens}"}
    if plan.cache is not None:
        found[plan.cache.place.fingerprint] = f"{mark}{tokens}"
    if plan.finetune is not None:
        found[plan.finetune.place.fingerprint] = f"{mark}{round(tokens * _visits(plan.finetune.config.train, rows))}"
    for generated in plan.generations:
        found[generated.place.fingerprint] = f"≤ {rows * generated.generation.decoding.max_new_tokens}"
    for trial in plan.trials:
        if trial.train is not None:
            found[trial.train.place.fingerprint] = f"{mark}{round(tokens * _visits(trial.train.training, rows))}"
        for evaluation in trial.evaluations:
            prompts = evaluation.benchmark.place.existing()
            count = prompts.manifest.counts["kept"] if prompts else _estimated_prompts(evaluation.benchmark)
            found[evaluation.place.fingerprint] = f"≤ {count * len(evaluation.seeds) * evaluation.decoding.max_new_tokens}"
    return found


def _estimated_prompts(benchmark: BenchmarkPlan) -> int:
    """Rows before the filter, which needs the tokenizer, but not more than the sample takes."""
    rows, sample = benchmark.rows.count(), benchmark.spec.sample
    return rows if sample is None else min(rows, sample.rows)


def _visits(training: Training, rows: int) -> float:
    """How often training sees each row, over all learning rates."""
    once = training.epochs or (training.max_steps or 0) * training.batch_size / max(rows, 1)
    return len(training.learning_rates) * once


def _training_rows(plan: Plan) -> tuple[int, int, int]:
    """(rows, tokens, response tokens): counted if prepared, else estimated from text length."""
    prepared = plan.data.place.existing()
    if prepared is not None:
        counts = prepared.manifest.counts["train"]
        return counts["kept"], counts["tokens"], counts["response_tokens"]
    return _estimated(plan.data.train)


def _estimated(rows: RowsPlan) -> tuple[int, int, int]:
    count = prompt = response = 0
    for example in rows.open():
        count += 1
        prompt += len(example.instruction) + len(example.input)
        response += len(example.references[0])
    expected = response / _CHARACTERS_PER_TOKEN + count
    return count, round(prompt / _CHARACTERS_PER_TOKEN + expected + _TEMPLATE_TOKENS * count), round(expected)


def state_of(place: Place) -> str:
    """What there is of an artifact: "done", "cached" or "to do"."""
    if place.stage == "compare":
        from pipeline.artifacts import peek

        manifest = peek(place.path)
        return "done" if manifest is not None and manifest.fingerprint == place.fingerprint else "to do"
    return "cached" if place.existing() is not None else "to do"
