"""The training loop as stages use it: one fit, or a search over learning rates in which every candidate has the same budget."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import write_text_atomically
from pipeline.config.methods import Training, Validation
from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import EncodedDataset, read_encoded, read_prompts
from pipeline.errors import ConfigError, TrainingError
from pipeline.evaluation.dev import dev_loss, dev_rouge
from pipeline.evaluation.generate import DecodingProtocol
from pipeline.losses.objective import Objective
from pipeline.models import load, lora
from pipeline.progress import progress
from pipeline.stages.place import MODEL
from pipeline.stages.prepare import DEV, DEV_PROMPTS
from pipeline.training.checkpoint import state_of
from pipeline.training.device import autocast_dtype, choose_device
from pipeline.training.feed import Share
from pipeline.training.launch import ProcessLost, forget, run_processes
from pipeline.training.loop import MetricsLog, OnStep, Settings, better, train
from pipeline.training.on_policy import OnPolicy, is_on_policy, own_samples, sample_seed
from pipeline.training.sharded import read_division
from pipeline.training.step import Student, Teacher
from pipeline.training.stopping import StopAsked, Stopped, stop_on_sigterm

if TYPE_CHECKING:
    from pipeline.training.replicas import Group

log = logging.getLogger(__name__)
METRICS, SUMMARY, ADAPTER = "metrics.jsonl", "summary.json", "adapter"
_CANDIDATES = "candidates"


@dataclass(frozen=True)
class Fit:
    """What a fit is given beside the models.

    Attributes:
        label: for people.
        seed: training seed.
        training, validation: the budget, and how the best checkpoint is chosen.
        base: folder of the model before training.
        rows: tokenised training rows.
        prepared: folder with the dev rows.
        max_tokens: most tokens of a row.
        on_policy: steps on the student's own samples, if any.
        stage: module with `unpack(plan)`, which gives processes of their own this fit and its subjects from `plan`.
        plan: of the stage, as JSON.
    """

    label: str
    seed: int
    training: Training
    validation: Validation
    base: Path
    rows: EncodedDataset
    prepared: Path
    max_tokens: int
    on_policy: OnPolicy | None
    stage: str
    plan: str


@dataclass(frozen=True)
class Subject:
    """What one fit trains, in place, and with what."""

    student: Student
    teacher: Teacher | None
    objective: Objective
    tokenizer: PreTrainedTokenizerBase


def fit_recipe(training: Training, validation: Validation) -> dict[str, Any]:
    """The settings that a fit's result depends on, for fingerprints."""
    adapter = {} if training.lora is None else {"lora": training.lora.model_dump(mode="json")}
    # How the same mathematics is carried out is left out: it changes nothing that a result may depend on.
    execution = {
        "seeds", "micro_batch_size", "halve_micro_batch_on_oom", "checkpoint_every", "elementwise", "gradient_checkpointing",
        "launch",
    }  # fmt: skip
    return {
        "training": {**training.model_dump(mode="json", exclude=execution | {"lora"}), **adapter},
        "autocast": str(autocast_dtype(training.precision, choose_device())),
        "validation": validation.model_dump(mode="json", exclude={"batch_size"}),
    }


Make = Callable[[PreTrainedModel], Subject]
"""What is trained, around a fresh base model."""


def check_launch(training: Training, what: str) -> None:
    """Refuse processes that this machine cannot run; `what` is the dotted path of the budget, for messages.

    Raises:
        ConfigError: more processes than CUDA devices, a configuration that cannot be read or has other options, or a package
            that is not installed.
    """
    launch, devices = training.launch, torch.cuda.device_count()
    if launch.processes == 1:
        return
    if devices and launch.processes > devices:
        raise ConfigError(
            f"{what}.launch.processes: {launch.processes} processes, but this machine has {devices} CUDA devices; lower it"
        )
    read_division(launch.strategy, launch.config, f"{what}.launch")
    if launch.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f'{what}.launch.strategy: deepspeed is not installed; pip install "deepspeed>=0.19", or set it to fsdp'
        )


def fit(job: Fit, subject: Make, folder: Path) -> dict[str, Any]:
    """Train and leave the selected weights, metrics.jsonl and summary.json in `folder`; goes on from what it left there.

    Args:
        job: budget and rows.
        subject: what is trained, around a fresh base model; called once for each learning rate that is not finished yet.
        folder: working folder.

    Returns:
        Counts: those of `pipeline.training.loop.Summary`, `learning_rate`, and of a search each candidate's outcome.

    Raises:
        DataError, Stopped, TrainingError: see `pipeline.training.loop.train` and, of several processes,
            `pipeline.training.launch.run_processes`. In a search, TrainingError only if every candidate fails.
    """
    rates = job.training.learning_rates
    if len(rates) == 1:
        counts = _fit_one(job, rates[0], subject, folder, job.label)
    else:
        outcomes = [_candidate(job, rate, subject, folder / _CANDIDATES / str(index)) for index, rate in enumerate(rates)]
        counts = _keep_best(job, outcomes, folder)
    if job.training.lora is not None and job.training.lora.save_merged:
        _merge(job, folder)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return counts


def load_fitted(base: Path, folder: Path, device: torch.device) -> PreTrainedModel:
    """The model of a fit's MODEL folder: a whole checkpoint, or an adapter that is added to the weights of `base`.

    Raises:
        ModelError: it cannot be loaded, or the adapter does not fit `base`.
    """
    if not lora.is_adapter(folder):
        return load.load_model(folder, device=device)
    model = load.load_model(base, device=device)
    lora.load_adapter(model, folder)
    lora.merge(model)
    return model


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; any would do, since padding is masked by position."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def run_rank(task: str, folder: Path, group: Group, stop: StopAsked) -> None:
    """One process's part of a fit at one learning rate; see `pipeline.training.launch.Job`.

    Raises:
        DataError, ModelError, Stopped, TrainingError: see `pipeline.training.loop.train`.
    """
    told = json.loads(task)
    job, make = importlib.import_module(told["stage"]).unpack(told["plan"])
    _fit_here(job, told["rate"], make, folder, told["label"], stop, group)


def _fit_one(job: Fit, rate: float, make: Make, folder: Path, label: str) -> dict[str, Any]:
    if (finished := _finished(folder)) is not None:  # killed between the end of training and the commit
        return finished
    launch = job.training.launch
    if launch.processes == 1:
        forget(folder)
        with stop_on_sigterm() as stop:
            counts = _fit_here(job, rate, make, folder, label, stop, None)
            if stop():  # asked after the last step: what follows would not see it
                raise Stopped(f"{label}: stopped after its last step; run the same command again to go on")
            return counts
    division = read_division(launch.strategy, launch.config, "train.launch")
    task = json.dumps({"stage": job.stage, "plan": job.plan, "rate": rate, "label": label})
    run_processes(__name__, task, folder, launch.processes, division, label)
    return _summary(folder)


def _finished(folder: Path) -> dict[str, Any] | None:
    """What a training came to that ended; None if it did not end, or a file system has lost what was written.

    Its checkpoint may be gone in part.
    """
    files = [folder / SUMMARY, folder / METRICS, *(file for file in (folder / MODEL).rglob("*") if file.is_file())]
    return _summary(folder) if all(file.is_file() and file.stat().st_size for file in files) else None


def _summary(folder: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return counts


def _fit_here(
    job: Fit, rate: float, make: Make, folder: Path, label: str, stop: StopAsked, group: Group | None
) -> dict[str, Any]:
    subject = make(_base_model(job))
    first, divided = group is None or group.first, group is not None and group.division is not None

    def whole() -> Subject:
        return _gathered(job, subject, make) if divided else subject

    def save_model(target: Path) -> None:
        model = whole().student.model
        if first:
            _save(job, model, subject.tokenizer, target)

    with contextlib.ExitStack() as bars:

        def watch(done: int, total: int) -> OnStep:
            advance = bars.enter_context(progress(label, total, "steps", done))
            return lambda step, metrics: advance(1, f"loss {metrics['train/loss']:.3f}")

        summary = train(
            subject.student, subject.teacher, subject.objective, job.rows, _settings(job, rate, subject.student.model.device),
            pad_token_id=pad_id(subject.tokenizer), folder=folder, validate=lambda: _validate(job, whole(), group),
            watch=watch, save_model=save_model, sampler=_sampler(job, subject), stop=stop, group=group,
        )  # fmt: skip
    counts = {**asdict(summary), "learning_rate": rate}
    if first:
        write_text_atomically(folder / SUMMARY, json.dumps(counts))
    return counts


def _gathered(job: Fit, subject: Subject, make: Make) -> Subject:
    """A copy of a student that processes share, with whole weights; all of them must call it."""
    weights = state_of(subject.student.model)
    copy = make(_base_model(job))
    copy.student.model.load_state_dict(weights, strict=False)  # tied parameters are there once
    return copy


def _save(job: Fit, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    if job.training.lora is None:
        model.save_pretrained(target)
    else:
        lora.save_adapter(model, target)
    tokenizer.save_pretrained(target)


def _base_model(job: Fit) -> PreTrainedModel:
    model = load.load_model(job.base, device=choose_device())
    adapter = job.training.lora
    if adapter is not None:
        lora.add_lora(
            model, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=adapter.target_modules,
            seed=job.seed,
        )  # fmt: skip
    if job.training.gradient_checkpointing:
        # Newer releases of transformers give it another name and warn of the old one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _merge(job: Fit, folder: Path) -> None:
    """The kept adapter moves to ADAPTER, and MODEL becomes a whole checkpoint."""
    adapter, fresh = folder / ADAPTER, folder / "model.fresh"
    if not adapter.exists():
        (folder / MODEL).rename(adapter)
    shutil.rmtree(fresh, ignore_errors=True)
    load_fitted(job.base, adapter, torch.device("cpu")).save_pretrained(fresh)
    load.load_tokenizer(adapter).save_pretrained(fresh)
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    fresh.rename(folder / MODEL)


@dataclass(frozen=True)
class _OwnSamples:
    """The student's own responses; see `pipeline.training.on_policy`."""

    job: Fit
    on_policy: OnPolicy
    subject: Subject

    def takes(self, step: int) -> bool:
        return is_on_policy(self.on_policy.seed, step, self.on_policy.fraction)

    def write(self, step: int, rows: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
        training, seed = self.job.training, sample_seed(self.on_policy.seed, step)
        return own_samples(
            self.subject.student.model, self.subject.tokenizer, rows, self.on_policy.protocol, seed,
            training.micro_batch_size or training.batch_size, self.job.max_tokens,
        )  # fmt: skip


def _sampler(job: Fit, subject: Subject) -> _OwnSamples | None:
    return None if job.on_policy is None else _OwnSamples(job, job.on_policy, subject)


def _candidate(job: Fit, rate: float, make: Make, folder: Path) -> dict[str, Any]:
    """One learning rate's outcome; a rate at which training breaks down is a result of the search, not its end."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SUMMARY).exists() and (folder / SUMMARY).stat().st_size:
        return _summary(folder)
    try:
        counts = _fit_one(job, rate, make, folder, f"{job.label}, learning rate {rate:g}")
    except ProcessLost:
        raise
    except TrainingError as error:
        log.warning("%s, learning rate %g: %s", job.label, rate, error)
        counts = {"learning_rate": rate, "failed": str(error)}
        write_text_atomically(folder / SUMMARY, json.dumps(counts))
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return counts


def _keep_best(job: Fit, outcomes: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    select = job.validation.select
    best: int | None = None
    for index, outcome in enumerate(outcomes):
        value = outcome.get("best_value")
        if value is not None and (best is None or better(value, outcomes[best]["best_value"], select)):
            best = index
    if best is None:
        raise TrainingError(f"{job.label}: training failed at every learning rate; the first: {outcomes[0]['failed']}")
    chosen = folder / _CANDIDATES / str(best)
    if (chosen / MODEL).exists():
        (chosen / MODEL).rename(folder / MODEL)
    for candidate in (folder / _CANDIDATES).iterdir():
        shutil.rmtree(candidate / MODEL, ignore_errors=True)
    shutil.copyfile(chosen / METRICS, folder / METRICS)
    found = {f"{outcome['learning_rate']:g}": outcome.get("best_value") for outcome in outcomes}
    values = {f"search/{rate}": value for rate, value in found.items() if value is not None}
    MetricsLog(folder / METRICS).write(outcomes[best]["steps"], values)
    seconds = math.fsum(outcome.get("seconds", 0.0) for outcome in outcomes)
    counts = {**outcomes[best], "search": found, "search_seconds": seconds}
    write_text_atomically(folder / SUMMARY, json.dumps(counts))
    return counts


def _settings(job: Fit, rate: float, device: torch.device) -> Settings:
    training = job.training
    return Settings(
        seed=job.seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        learning_rate=rate,
        min_learning_rate=training.min_learning_rate,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        betas=training.betas,
        max_grad_norm=training.max_grad_norm,
        autocast=autocast_dtype(training.precision, device),
        checkpoint_every=training.checkpoint_every,
        validate_every=job.validation.every_steps,
        select=job.validation.select,
        backend=training.elementwise,
        halve_on_oom=training.halve_micro_batch_on_oom,
    )


def _validate(job: Fit, subject: Subject, group: Group | None) -> dict[str, float]:
    """Scores on the dev rows; several processes divide them."""
    validation, student, tokenizer = job.validation, subject.student, subject.tokenizer
    student.model.eval()
    rows = read_encoded(job.prepared / DEV)
    share = Share() if group is None else Share(group.rank, group.size)
    chosen = [rows[i] for i in share.of(range(min(validation.rows or len(rows), len(rows))))]
    tokens = sum(len(row.input_ids) - row.prompt_tokens for row in chosen)
    loss = dev_loss(student.model, student.lens, chosen, validation.batch_size, pad_id(tokenizer))
    scores = {"dev/loss": _mean(group, loss, tokens)}
    if validation.select == "rouge_l":
        prompts = list(read_prompts(job.prepared / DEV_PROMPTS))[: validation.rows][share.rank :: share.size]
        protocol = DecodingProtocol(**validation.decoding.model_dump())
        rouge = 0.0
        if prompts:
            rouge = dev_rouge(student.model, tokenizer, prompts, protocol, validation.seed, validation.batch_size)
        scores["dev/rouge_l"] = _mean(group, rouge, len(prompts))
    return scores


def _mean(group: Group | None, value: float, weight: int) -> float:
    """The mean over the processes' rows of what each has as the mean over `weight` of its own."""
    if group is None:
        return value
    total, weights = group.sum([value * weight, weight])
    return total / max(weights, 1)
