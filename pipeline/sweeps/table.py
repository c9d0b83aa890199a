"""The expanded plan of a sweep, shown before it runs."""

from __future__ import annotations

from rich.table import Table

from pipeline.config.sweep import OptunaSearch, Sweep
from pipeline.estimate import state_of
from pipeline.stages.place import Place
from pipeline.sweeps.plan import SweepPlan


def sweep_table(sweep: Sweep, plan: SweepPlan) -> Table:
    """Shared stages, then one line a trial: what is done and what is to do."""
    table = Table(title=_title(sweep, plan), title_justify="left", caption=_caption(sweep), caption_justify="left")
    for column in ("what", "fingerprint", "state"):
        table.add_column(column, no_wrap=column != "what")
    for place in shared_places(plan):
        table.add_row(place.label, place.fingerprint, state_of(place))
    table.add_section()
    for trial in plan.trials:
        state = "done" if trial.trial.finished() else "to do"
        table.add_row(trial.trial.name, trial.fingerprint, state)
    return table


def shared_places(plan: SweepPlan) -> list[Place]:
    """Artifacts that trials start from, each once."""
    found: dict[str, Place] = {}
    for trial in plan.trials:
        own = trial.plan
        places = [model.place for model in own.models if model.place is not None]
        places += [own.data.place, *(benchmark.place for benchmark in own.benchmarks)]
        places += [own.finetune.place] if own.finetune is not None else []
        places += [own.student.place]
        places += [own.cache.place] if own.cache is not None else []
        places += [generation.place for generation in own.generations]
        found |= {place.fingerprint: place for place in places}
    return list(found.values())


def _title(sweep: Sweep, plan: SweepPlan) -> str:
    trained = [trial for trial in plan.trials if trial.trial.train is not None]
    repeated = f", {plan.asked - len(trained)} repetitions left out" if plan.asked > len(trained) else ""
    done = sum(trial.trial.finished() for trial in plan.trials)
    return f"{sweep.name}: {len(trained)} trainings in {len(plan.trials)} trials, {done} finished{repeated}"


def _caption(sweep: Sweep) -> str:
    parts = [f"{sweep.concurrency} at a time, engine {sweep.engine.kind}"]
    if isinstance(sweep.search, OptunaSearch):
        parts.append(
            f"{sweep.search.points} points follow, {sweep.search.batch} at a time, each chosen by the results before it"
        )
    return "; ".join(parts)
