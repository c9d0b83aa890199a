"""The whole experiment, readable as the picture: prepare → teacher → student → cache → train → evaluate → compare."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from flows.engine import wait_for_recording
from pipeline.artifacts import text_digest
from pipeline.config import load_experiment
from pipeline.plan import Plan, plan_experiment
from pipeline.stages.compare import Trial, git_commit
from pipeline.tracked import mark_tracked
from pipeline.tracking import MLflowTracker, RunFacts, Tracker, flatten, tracked
from pipeline.training.device import flush_denormals
from tasks.cache import cache_teacher
from tasks.compare import compare
from tasks.evaluate import evaluate
from tasks.finetune_teacher import finetune_teacher
from tasks.import_model import import_model
from tasks.lens_profile import profile_lens
from tasks.prepare import prepare
from tasks.record import data_input
from tasks.seqkd import generate
from tasks.student import initialise_student
from tasks.train import train

STAGES = ("prepare", "cache", "train", "evaluate", "compare")


@flow(name="reproduce", flow_run_name="{config}", validate_parameters=False, log_prints=False)
def reproduce(config: str, overrides: list[str], run_dir: str, until: str = "compare") -> None:
    """Run an experiment from its file.

    Args:
        config: path of the experiment file.
        overrides: `dotted.path=value` settings.
        run_dir: where everything goes.
        until: last stage to run, one of STAGES.
    """
    flush_denormals()
    plan = plan_experiment(load_experiment(Path(config), overrides), Path(run_dir))
    plan.write_config()
    tracker = MLflowTracker(plan.run_dir, plan.experiment.name)
    run_stages(plan, tracker, until)
    if until == STAGES[-1] and not tracker.failures:
        mark_tracked(plan)


def run_stages(plan: Plan, tracker: Tracker, until: str) -> None:
    """The flow's body."""
    name = plan.experiment.name
    last = STAGES.index(until)
    for model in plan.models:
        import_model(model)
    tasks = len(plan.models) + 1 + len(plan.benchmarks)
    stage_runs = {"prepare": prepare(plan.data, name, tracker)}
    for benchmark in plan.benchmarks:
        prepare(benchmark, name, tracker)
    if last >= STAGES.index("cache"):
        if plan.finetune is not None:
            stage_runs["teacher"] = finetune_teacher(plan.finetune, name, tracker)
        stage_runs["student"] = initialise_student(plan.student, name, tracker)
        if plan.cache is not None:
            stage_runs["cache"] = cache_teacher(plan.cache, name, tracker)
        tasks += 1 + (plan.finetune is not None) + (plan.cache is not None)
    if last >= STAGES.index("train"):
        for generation in plan.generations:
            stage_runs[f"seqkd.{generation.place.fingerprint}"] = generate(generation, name, tracker)
        tasks += len(plan.generations)
        for trial in plan.trials:
            tasks += run_trial(plan, trial, tracker, stage_runs, evaluates=last >= STAGES.index("evaluate"))
    if last >= STAGES.index("compare"):
        compare(plan.comparison, tracker)
        tasks += 1
    if flow_run.id is not None:
        wait_for_recording(UUID(str(flow_run.id)), tasks)


def run_trial(plan: Plan, trial: Trial, tracker: Tracker, stage_runs: dict[str, str], evaluates: bool) -> int:
    """One row of the comparison, as one flat run; returns the number of tasks that ran."""
    facts = trial_facts(plan, trial, stage_runs)
    if tracker.delivered(facts.key) is not None and trial.finished():
        return 0
    run_id = tracker.start(facts)
    with tracked(tracker, run_id):
        if trial.train is not None:
            train(trial.train, run_id, tracker)
        if evaluates:
            evaluate(trial, run_id, tracker)
            if trial.profile is not None:
                profile_lens(trial.profile, run_id, tracker)
            tracker.log_files(run_id, [plan.config_path], "config")
            for stage_run in stage_runs.values():
                tracker.set_tags(stage_run, {f"trial.{trial.name}": run_id})
            tracker.finish(run_id, "FINISHED")
    return (trial.train is not None) + evaluates * (1 + (trial.profile is not None))


def trial_facts(plan: Plan, trial: Trial, stage_runs: dict[str, str]) -> RunFacts:
    """Name, settings, labels and data sets of a trial."""
    experiment = plan.experiment
    params = {"method": trial.method, "student": plan.student.config.kind, "student_layers": plan.student.layers}
    if trial.train is not None:
        params |= {"train_seed": trial.seed, "alpha": trial.train.alpha}
        params |= flatten(trial.train.config.model_dump(mode="json", exclude={"alpha", "train"}), "method.")
        params |= flatten(trial.train.training.model_dump(mode="json", exclude={"seeds"}), "train.")
    fingerprints = {plan.benchmark.name: plan.place.fingerprint for plan in trial.evaluations}
    fingerprints |= {f"{plan.evaluation.benchmark.name} {plan.name}": plan.place.fingerprint for plan in trial.metrics}
    if trial.profile is not None:
        fingerprints["lens profile"] = trial.profile.place.fingerprint
    inputs = []
    if trial.train is not None:
        rows = plan.data.place.open().manifest.counts["train"]["kept"]
        inputs.append(data_input(plan.data.train, "train", rows, "training"))
    inputs += [data_input(b.rows, b.name, b.place.open().manifest.counts["kept"], "evaluation") for b in plan.benchmarks]
    return RunFacts(
        key=text_digest(repr([trial.name, trial.train and trial.train.place.fingerprint, sorted(fingerprints.items())]))[:16],
        name=trial.name,
        experiment=experiment.name,
        params=params,
        tags={
            "method": trial.method,
            "teacher": plan.models[0].location.label,
            "git_commit": git_commit() or "unknown",
            "experiment_fingerprint": plan.comparison.place.fingerprint,
            **{f"stage_run.{stage}": run_id for stage, run_id in stage_runs.items()},
            **{f"fingerprint.evaluate.{benchmark}": value for benchmark, value in fingerprints.items()},
        },
        inputs=inputs,
    )
