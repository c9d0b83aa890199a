"""The loop: batches in a fixed order, steps, validations, checkpoints, metrics. The same for every method."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.artifacts import sync, sync_all
from pipeline.data.collate import IGNORE_INDEX, Batch
from pipeline.errors import DataError, TrainingError
from pipeline.losses.elementwise import Backend
from pipeline.losses.objective import Objective, teacher_layers
from pipeline.teacher.signal import TeacherSignal
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Progress
from pipeline.training.device import peak_memory_gib, reset_peak_memory
from pipeline.training.feed import Order, Rows, Sampler, Share, StepInput, feed
from pipeline.training.optim import adamw, learning_rate, set_learning_rate
from pipeline.training.step import Student, Teacher, optimizer_step
from pipeline.training.stopping import StopAsked, Stopped, never

if TYPE_CHECKING:
    from pipeline.training.replicas import Group  # brings accelerate, which one process has no use for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Everything about a run that is neither model, method nor data; see `pipeline.config.methods.Training`."""

    seed: int
    epochs: float | None
    max_steps: int | None
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    min_learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float | None
    autocast: torch.dtype | None
    checkpoint_every: int
    validate_every: int | None
    select: str
    backend: Backend
    halve_on_oom: bool = False


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        steps: optimiser steps.
        tokens: real input tokens seen.
        seconds: training time without validation.
        peak_memory_gib: highest resident memory of the process (CPU) or allocated memory (CUDA) during the run; of several
            processes the highest.
        best_step: the step whose weights were kept.
        best_value: its value of the selection metric, None for "last".
    """

    steps: int
    tokens: int
    seconds: float
    peak_memory_gib: float
    best_step: int
    best_value: float | None


OnStep = Callable[[int, dict[str, float]], None]
"""Called after each step with the number of steps done and the step's metrics."""
Validate = Callable[[], dict[str, float]]
"""Scores of the current weights on the dev rows: "dev/rouge_l" (0–100) and "dev/loss" (nats)."""


def train(
    student: Student,
    teacher: Teacher | None,
    objective: Objective,
    rows: Rows,
    settings: Settings,
    *,
    pad_token_id: int,
    folder: Path,
    validate: Validate,
    save_model: Callable[[Path], None],
    watch: Callable[[int, int], OnStep],
    sampler: Sampler | None = None,
    stop: StopAsked = never,
    group: Group | None = None,
) -> Summary:
    """Train and leave the selected weights in `folder`/model; go on from `folder`/checkpoint if there is one.

    Args:
        student: trained in place.
        teacher: needed by every method but SFT.
        objective: the method.
        rows: tokenised training rows.
        settings: budget, optimiser, seeds.
        pad_token_id: any valid token id.
        folder: working folder; gets metrics.jsonl, checkpoint/ and model/.
        validate: called on the student in evaluation mode; gives the same scores in every process.
        save_model: writes the student into a folder; called by every process, to put the student together, the first writes.
        watch: told how many steps are done already and how many there are in all; what it returns is called after each step.
        sampler: writes the responses of some steps itself.
        stop: asked after each step; once true for any process, a checkpoint is written and training ends.
        group: the processes that train together, all of them calling this with equal arguments; None is this one alone.

    Raises:
        DataError: fewer rows than a batch.
        Stopped: it was asked to.
        TrainingError: the loss or the gradient is not finite, or there is no memory for a step.
    """
    if settings.batch_size > len(rows):
        raise DataError(f"train.batch_size: {settings.batch_size} rows, but there are only {len(rows)} training rows; lower it")
    first = group is None or group.first
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    total = total_steps(len(rows), settings.batch_size, settings.epochs, settings.max_steps)
    torch.manual_seed(settings.seed)
    checkpoint.load_weights(folder / "checkpoint", student)

    def make() -> torch.optim.Optimizer:
        return adamw(student.modules, settings.learning_rate, settings.weight_decay, settings.betas)

    replica = None if group is None else group.attach(student, make, settings.max_grad_norm)
    optimizer = make() if replica is None else replica.optimizer
    progress = checkpoint.load_state(folder / "checkpoint", optimizer) or Progress()
    if progress.step:
        log.info("going on from step %d of %d", progress.step, total)
    on_step = watch(progress.step, total)
    metrics = MetricsLog(folder / "metrics.jsonl", writes=first)
    saved = progress.step

    def save() -> None:
        nonlocal saved
        metrics.sync()
        checkpoint.save(folder / "checkpoint", student, optimizer, progress, writes=first)
        saved = progress.step

    limit: int | None = None  # rows of a forward pass after there was no memory for more
    updating: list[bool] = []
    halves = settings.halve_on_oom and group is None and not _rows_meet(objective)
    if halves:
        assert isinstance(optimizer, torch.optim.Optimizer)  # ZeRO's belongs to a group
        optimizer.register_step_pre_hook(lambda *_: updating.append(True))

    reset_peak_memory(student.model.device)
    if progress.due:
        progress = _validate(student, progress, settings.select, validate, save_model, folder, metrics, first)
    order = Order(settings.batch_size, settings.micro_batch_size, settings.seed, total)
    steps = feed(
        rows, order, progress.step, pad_token_id=pad_token_id, device=student.model.device,
        source=teacher.source if teacher else None,
        layers=teacher_layers(objective, teacher.lens.num_layers) if teacher else (), sampler=sampler,
        share=Share() if group is None else Share(group.rank, group.size),
    )  # fmt: skip
    # However this ends, the thread that prepares the next step ends with it.
    with contextlib.closing(steps):
        for started, inputs in _timed(steps):
            step, micro = inputs.step, inputs.micro_batches
            rate = learning_rate(
                step, total, schedule=settings.schedule, peak=settings.learning_rate,
                floor=settings.min_learning_rate, warmup=settings.warmup_steps,
            )  # fmt: skip
            set_learning_rate(optimizer, rate)
            student.model.train()
            if group is not None:
                torch.manual_seed(_own_seed(settings.seed, step, group.rank))

            def compute(micro: Sequence[Batch], signals: Sequence[TeacherSignal] | None, step: int = step) -> dict[str, float]:
                return optimizer_step(
                    student,
                    teacher,
                    objective,
                    micro,
                    optimizer,
                    max_grad_norm=settings.max_grad_norm,
                    autocast=settings.autocast,
                    backend=settings.backend,
                    signals=signals,
                    draw=step + (settings.seed << 32),
                    replica=replica,
                )

            if limit is not None:
                micro = _at_most(limit, micro)
            signals = inputs.signals if limit is None else None
            before = checkpoint.rng_state() if halves else {}
            updating.clear()
            losses: dict[str, float] = {}
            while not losses:
                try:
                    losses = compute(micro, signals)
                except (MemoryError, RuntimeError) as error:
                    if not _is_out_of_memory(error):
                        raise
                    largest = max(len(part.example_ids) for part in micro)
                    # Once the update has begun, some weights may be those of the next step.
                    if not halves or limit is not None or largest == 1 or updating:
                        what = f"no memory for {largest} rows in one pass ({str(error).splitlines()[0]})"
                        fix = "set train.micro_batch_size lower, or train.halve_micro_batch_on_oom=true"
                        raise _failure(inputs, rows, folder, saved, what, fix) from error
                    limit = math.ceil(largest / 2)
                    log.warning("step %d: no memory for %d rows in one pass; going on with %d", step + 1, largest, limit)
                if not losses:  # outside the handler, whose error holds on to the memory of the failed pass
                    for module in student.modules:
                        module.zero_grad(set_to_none=True)
                    checkpoint.restore_rng(before)
                    assert limit is not None
                    micro, signals = _at_most(limit, micro), None
            tokens = sum(int(part.attention_mask.sum()) for part in micro if sum(part.response_counts))
            losses, tokens, stopping = _together(group, losses, tokens, stop())
            bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
            if bad:
                raise _failure(
                    inputs, rows, folder, saved, f"{bad} is not finite", "lower train.learning_rate or look at these rows"
                )
            seconds = time.perf_counter() - started
            progress = replace(progress, step=step + 1, tokens=progress.tokens + tokens, seconds=progress.seconds + seconds)
            values = {f"train/{name}": value for name, value in losses.items()}
            values |= {"train/learning_rate": rate, "train/tokens_per_second": tokens / seconds}
            if sampler is not None:
                values["train/on_policy"] = float(inputs.sampled)
            metrics.write(step + 1, values)
            on_step(step + 1, values)
            due = _validates(step + 1, total, per_epoch, settings.validate_every)
            if stopping:
                progress = replace(progress, due=due)
                save()
                raise Stopped(
                    f"stopped after step {step + 1} of {total}, with a checkpoint; run the same command again to go on"
                )
            if due:
                progress = _validate(student, progress, settings.select, validate, save_model, folder, metrics, first)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == total:
                save()
    assert progress.best_step is not None  # the last step always validates
    peak = peak_memory_gib(student.model.device)
    return Summary(
        progress.step,
        progress.tokens,
        progress.seconds,
        peak if group is None else max(group.gather(peak)),
        progress.best_step,
        progress.best_value,
    )


def _together(group: Group | None, losses: dict[str, float], tokens: int, stopping: bool) -> tuple[dict[str, float], int, bool]:
    """A step as all processes made it; whether to stop, too, is decided together, so that all do so at the same step."""
    if group is None:
        return losses, tokens, stopping
    shares = {name: value for name, value in losses.items() if name != "grad_norm"}
    *sums, all_tokens, asked = group.sum([*shares.values(), tokens, stopping])
    return {**dict(zip(shares, sums, strict=True)), "grad_norm": losses["grad_norm"]}, int(all_tokens), asked > 0


def _own_seed(seed: int, step: int, rank: int) -> int:
    """Of a process's dropout in one step: other masks in every process and step, and no state to keep."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{step}\0{rank}".encode()).digest()[:8], "big")


def total_steps(rows: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimiser steps of a budget that gives one of epochs and max_steps; an epoch's last batch may be short."""
    return max_steps or math.ceil(math.ceil(rows / batch_size) * (epochs or 1))


class MetricsLog:
    """metrics.jsonl: one line per record, on disk before anything else sees it.

    After a resume the steps between the checkpoint and the kill are done again with equal results; their lines are
    already there and are not written twice, so a reader can ship the file by offset alone. Of several processes one `writes`.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        if writes:
            self._drop_torn_line()
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        self._written = {(record["step"], frozenset(record["metrics"])) for record in records}

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a record unless this step's is there already."""
        key = (step, frozenset(metrics))
        if key in self._written or not self._writes:
            return
        self._written.add(key)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "time": time.time(), "metrics": metrics}) + "\n")

    def sync(self) -> None:
        """Make the records so far durable."""
        if self._writes and self._path.exists():
            sync(self._path)

    def _drop_torn_line(self) -> None:
        if self._path.exists():
            content = self._path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                self._path.write_bytes(whole)


def _timed(steps: Iterator[StepInput]) -> Iterator[tuple[float, StepInput]]:
    """Each step's input with the time at which the loop began to wait for it: waiting for data is part of a step."""
    while True:
        started = time.perf_counter()
        inputs = next(steps, None)
        if inputs is None:
            return
        yield started, inputs


def _validates(step: int, total: int, per_epoch: int, every: int | None) -> bool:
    return step == total or step % (every or per_epoch) == 0


def _validate(
    student: Student,
    progress: Progress,
    select: str,
    validate: Validate,
    save_model: Callable[[Path], None],
    folder: Path,
    metrics: MetricsLog,
    writes: bool,
) -> Progress:
    progress = replace(progress, due=False)
    student.model.eval()
    scores = validate()
    metrics.write(progress.step, scores)
    value = {"rouge_l": scores.get("dev/rouge_l"), "loss": scores.get("dev/loss"), "last": None}[select]
    if not better(value, progress.best_value, select):
        return progress
    fresh = folder / "model.fresh"
    if writes:
        shutil.rmtree(fresh, ignore_errors=True)
    save_model(fresh)
    if writes:
        sync_all(fresh)  # before a checkpoint says that this step's weights are kept
        shutil.rmtree(folder / "model", ignore_errors=True)
        fresh.rename(folder / "model")
    return replace(progress, best_step=progress.step, best_value=value)


def better(value: float | None, best: float | None, select: str) -> bool:
    """Whether a validation's value is to be kept rather than the best so far; "last" has no values and keeps every one."""
    if value is None or best is None:
        return True
    return value < best if select == "loss" else value > best


def _failure(inputs: StepInput, rows: Rows, folder: Path, saved: int, what: str, fix: str) -> TrainingError:
    """What ended training at a step, the step's rows, and what there is to go on from."""
    ids = [rows[index].id for index in inputs.indices]
    kept = f"The checkpoint of step {saved} is kept in {folder / 'checkpoint'}" if saved else "There is no checkpoint yet"
    return TrainingError(f"step {inputs.step + 1}: {what}; rows {ids}. {kept}; {fix}, then run again")


def _rows_meet(objective: Objective) -> bool:
    """Whether a loss depends on which rows share a forward pass (hazards 1 and 3)."""
    official = objective.lens is not None and objective.lens.mask_layout == "official"
    return official or (objective.features is not None and objective.features.positions == "all")


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no error type of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _at_most(limit: int, micro_batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The same rows in passes of at most `limit`, each as wide as its longest row."""
    return tuple(
        _rows_of(batch, start, start + limit)
        for batch in micro_batches
        for start in range(0, len(batch.example_ids), limit)
    )  # fmt: skip


def _rows_of(batch: Batch, first: int, end: int) -> Batch:
    mask = batch.attention_mask[first:end]
    width = int(mask.sum(dim=1).max())
    labels = batch.labels[first:end, :width].contiguous()
    return Batch(
        example_ids=batch.example_ids[first:end],
        input_ids=batch.input_ids[first:end, :width].contiguous(),
        attention_mask=mask[:, :width].contiguous(),
        labels=labels,
        response_positions=(labels != IGNORE_INDEX).flatten().nonzero().squeeze(1),
        response_counts=batch.response_counts[first:end],
    )
