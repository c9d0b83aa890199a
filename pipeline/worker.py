"""A trial in a process of its own: `python -m pipeline.worker SPEC`, where SPEC is JSON that `spec_of` made."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Experiment
from pipeline.config.loading import validate
from pipeline.errors import ConfigError, PipelineError
from pipeline.plan import Plan, plan_experiment, write_config
from pipeline.processes import die_with_parent, exit_on_sigterm
from pipeline.stages import cache, finetune_teacher, import_model, prepare, seqkd, student
from pipeline.stages.compare import Trial
from pipeline.terminal import log_to_terminal, plain
from pipeline.tracking import MLflowTracker
from pipeline.training.device import flush_denormals
from pipeline.trial import run_trial


def spec_of(plan: Plan, trial: Trial, stage_runs: Mapping[str, str]) -> dict[str, Any]:
    """Everything that another process, also on another machine, needs to carry out a trial; plain JSON."""
    return {
        "experiment": plan.experiment.model_dump(mode="json"),
        "run_dir": str(plan.run_dir.resolve()),
        "name": trial.name,
        "method": trial.method,
        "seed": trial.seed,
        "variant": trial.variant,
        "fingerprints": [place.fingerprint for place in trial.places],
        "stage_runs": dict(stage_runs),
    }


def main(path: Path) -> int:
    """Carry out one trial; returns the exit code, and prints the message of an expected failure as the last line."""
    die_with_parent()
    exit_on_sigterm()
    log_to_terminal("%(asctime)s %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    flush_denormals()
    try:
        _run(json.loads(path.read_text(encoding="utf-8")), path.parent)
    except PipelineError as error:
        print(plain(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    return 0


def _run(spec: dict[str, Any], folder: Path) -> None:
    experiment = validate(Experiment, spec["experiment"], f"trial {spec['name']}")
    plan = plan_experiment(experiment, Path(spec["run_dir"]))
    trial = next(t for t in plan.trials if (t.method, t.seed) == (spec["method"], spec["seed"]))
    trial = replace(trial, variant=spec["variant"])
    # A database between there and here may have changed the order of benchmarks.
    if sorted(place.fingerprint for place in trial.places) != sorted(spec["fingerprints"]):
        raise ConfigError(
            f"trial {trial.name}: its inputs or the code are not those that it was planned with (a file, a branch on the hub, "
            "the installed version); run the sweep again"
        )
    make_inputs(plan)
    config = folder / "config.yaml"
    write_config(config, experiment)
    with MLflowTracker(plan.run_dir, experiment.name) as tracker:
        run_trial(plan, trial, config, tracker, spec["stage_runs"])


def make_inputs(plan: Plan) -> None:
    """Everything that trials of a plan start from: there already on the machine that planned, fetched or made elsewhere."""
    for model in plan.models:
        import_model.run(model)
    prepare.run(plan.data)
    for benchmark in plan.benchmarks:
        prepare.run_benchmark(benchmark)
    if plan.finetune is not None:
        finetune_teacher.run(plan.finetune)
    student.run(plan.student)
    if plan.cache is not None:
        cache.run(plan.cache)
    for generation in plan.generations:
        seqkd.run(generation)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
