"""The loop on tiny models: learning, accumulation, exact resume, selection, metrics on disk."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import EncodedDataset, read_encoded, write_encoded
from pipeline.errors import ArtifactError, DataError, TrainingError
from pipeline.losses.objective import FeatureTerm, LensTerm, Objective, new_projection
from pipeline.models.lens import logit_lens
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.loop import MetricsLog, OnStep, Settings, Summary, total_steps, train
from pipeline.training.optim import adamw, learning_rate
from pipeline.training.step import Student, Teacher
from pipeline.training.stopping import Stopped

SETTINGS = tiny.settings(select="loss")
PAIRS = ((1, 2), (2, 4))
OBJECTIVES = {
    "sft": Objective(0.0),
    "kd": Objective(0.5, "forward_kl"),
    "mse": Objective(1.0, "forward_kl", features=FeatureTerm(1.0, PAIRS, "response", "teacher")),
    "distilllens": Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, False, "aligned")),
}


def rows(folder: Path, count: int = 14) -> EncodedDataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(1, 300, (length,), generator=generator).tolist()
        examples.append(EncodedExample(f"e{index}", tuple(ids), int(torch.randint(1, length - 2, (1,), generator=generator))))
    write_encoded(folder / "rows.arrow", examples)
    return read_encoded(folder / "rows.arrow")


def student(objective: Objective, dropout: float = 0.0) -> Student:
    model = tiny.gpt2(layers=3, dropout=dropout, seed=7)
    return Student(model, logit_lens(model), new_projection(objective.features, 32, 32) if objective.features else None)


def teacher() -> Teacher:
    model = tiny.gpt2(layers=6, seed=8)
    return Teacher(OnlineTeacher(model), logit_lens(model))


def run(
    folder: Path,
    objective: Objective,
    settings: Settings = SETTINGS,
    trained: Student | None = None,
    stop_at: int | None = None,
    scores: list[float] | None = None,
    watched: list[tuple[int, int]] | None = None,
    asked_at: int | None = None,
) -> tuple[Summary, Student]:
    trained = trained or student(objective)
    remaining = list(scores or [])
    asked: list[int] = []

    def watch(done: int, total: int) -> OnStep:
        if watched is not None:
            watched.append((done, total))

        def on_step(step: int, metrics: dict[str, float]) -> None:
            if step == stop_at:
                raise KeyboardInterrupt
            if asked_at is not None and step + 1 == asked_at:
                asked.append(step)

        return on_step

    def validate() -> dict[str, float]:
        return {"dev/loss": remaining.pop(0) if remaining else 1.0}

    folder.mkdir(exist_ok=True)
    summary = train(
        trained,
        teacher(),
        objective,
        rows(folder),
        settings,
        pad_token_id=0,
        folder=folder,
        validate=validate,
        watch=watch,
        save_model=lambda target: trained.model.save_pretrained(target),
        stop=lambda: bool(asked),
    )
    return summary, trained


def weights(trained: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for module in trained.modules for p in module.parameters()])


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_lowers_its_loss(tmp_path: Path, name: str) -> None:
    run(tmp_path, OBJECTIVES[name], replace(SETTINGS, max_steps=30, validate_every=None))
    losses = [r["metrics"]["train/loss"] for r in records(tmp_path) if "train/loss" in r["metrics"]]
    assert len(losses) == 30 and sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str, stop_at: int) -> None:
    whole, first = run(tmp_path / "whole", OBJECTIVES[name], trained=student(OBJECTIVES[name], dropout=0.1))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", OBJECTIVES[name], trained=student(OBJECTIVES[name], dropout=0.1), stop_at=stop_at)
    torch.manual_seed(99)  # a new process has other random states
    resumed, second = run(tmp_path / "cut", OBJECTIVES[name], trained=student(OBJECTIVES[name], dropout=0.1))
    assert torch.equal(weights(first), weights(second))
    assert (whole.steps, whole.tokens, whole.best_step) == (resumed.steps, resumed.tokens, resumed.best_step)

    def losses(folder: Path) -> list[object]:
        return [(r["step"], {k: v for k, v in r["metrics"].items() if "per_second" not in k}) for r in records(folder)]

    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize("asked_at", [2, 3, 5, 6])
def test_a_run_asked_to_stop_ends_after_its_step_and_goes_on_as_if_it_never_had(tmp_path: Path, asked_at: int) -> None:
    """Steps 3 and 6 end with a validation, which a stop puts off to the next run."""
    objective = OBJECTIVES["distilllens"]
    whole, first = run(tmp_path / "whole", objective, trained=student(objective, dropout=0.1), scores=[2.0, 3.0])
    with pytest.raises(Stopped, match=f"after step {asked_at} of 6, with a checkpoint") as stopped:
        run(tmp_path / "cut", objective, trained=student(objective, dropout=0.1), asked_at=asked_at, scores=[2.0, 3.0])
    assert stopped.value.exit_code == 143
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())  # though the error is held on to
    assert [r["step"] for r in records(tmp_path / "cut") if "train/loss" in r["metrics"]] == list(range(1, asked_at + 1))
    assert [r["step"] for r in records(tmp_path / "cut") if "dev/loss" in r["metrics"]] == ([3] if asked_at > 3 else [])
    torch.manual_seed(99)
    watched: list[tuple[int, int]] = []
    left = [3.0] if asked_at > 3 else [2.0, 3.0]
    resumed, second = run(
        tmp_path / "cut", objective, trained=student(objective, dropout=0.1), scores=left, watched=watched
    )  # fmt: skip
    assert watched == [(asked_at, 6)]
    assert torch.equal(weights(first), weights(second))
    assert (
        (whole.steps, whole.tokens, whole.best_step)
        == (resumed.steps, resumed.tokens, resumed.best_step)
        == (6, whole.tokens, 3)
    )
    assert [r["step"] for r in records(tmp_path / "cut") if "dev/loss" in r["metrics"]] == [3, 6]


def test_a_watcher_is_told_where_a_resumed_run_begins(tmp_path: Path) -> None:
    watched: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, OBJECTIVES["sft"], stop_at=3, watched=watched)
    run(tmp_path, OBJECTIVES["sft"], watched=watched)
    assert watched == [(0, 6), (2, 6)]


def test_the_steps_of_a_budget() -> None:
    assert total_steps(14, 4, None, 6) == 6 and total_steps(14, 4, 2, None) == 8
    assert total_steps(14, 4, 0.5, None) == 2 and total_steps(12, 4, 1.5, None) == 5


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    summary, trained = run(tmp_path, OBJECTIVES["kd"], replace(SETTINGS, validate_every=2), scores=[3.0, 1.0, 2.0])
    assert (summary.best_step, summary.best_value) == (4, 1.0)
    kept = type(trained.model).from_pretrained(tmp_path / "model")
    last = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
    assert not torch.equal(torch.cat([p.detach().flatten() for p in kept.parameters()]), last)


def test_without_selection_the_last_weights_are_kept(tmp_path: Path) -> None:
    summary, trained = run(
        tmp_path, OBJECTIVES["kd"], replace(SETTINGS, select="last", validate_every=2), scores=[1.0, 2.0, 3.0]
    )
    kept = type(trained.model).from_pretrained(tmp_path / "model")
    assert summary.best_step == 6 and torch.equal(kept.transformer.wte.weight, trained.model.transformer.wte.weight)


def test_the_data_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    same = [weights(run(tmp_path / name, OBJECTIVES["sft"])[1]) for name in ("a", "b")]
    other = weights(run(tmp_path / "c", OBJECTIVES["sft"], replace(SETTINGS, seed=4))[1])
    assert torch.equal(*same) and not torch.equal(same[0], other)


def test_epochs_visit_every_row_once(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, OBJECTIVES["sft"], replace(SETTINGS, max_steps=None, epochs=2, validate_every=None))
    data = rows(tmp_path)
    assert summary.steps == 8 and summary.tokens == 2 * sum(data.lengths)
    assert [r["step"] for r in records(tmp_path) if "dev/loss" in r["metrics"]] == [4, 8]


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.batch_size: 15 rows, but there are only 14"):
        run(tmp_path, OBJECTIVES["sft"], replace(SETTINGS, batch_size=15))


def test_a_loss_that_is_not_finite_stops_with_the_rows(tmp_path: Path) -> None:
    broken = student(OBJECTIVES["sft"])
    broken.model.transformer.wte.weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 1: .*rows \['e"):
        run(tmp_path, OBJECTIVES["sft"], trained=broken)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, OBJECTIVES["sft"], stop_at=3)
    (tmp_path / "checkpoint" / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="damaged checkpoint"):
        run(tmp_path, OBJECTIVES["sft"])


def test_a_torn_line_is_dropped_and_steps_are_not_written_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(1, {"a": 1.0})
    log.write(1, {"b": 1.0})
    with (tmp_path / "m.jsonl").open("a") as stream:
        stream.write('{"step": 2, "met')
    again = MetricsLog(tmp_path / "m.jsonl")
    again.write(1, {"a": 5.0})
    again.write(2, {"a": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(r["step"], r["metrics"]) for r in lines] == [(1, {"a": 1.0}), (1, {"b": 1.0}), (2, {"a": 2.0})]


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        return [learning_rate(s, 6, schedule=schedule, peak=1.0, floor=0.1, warmup=2) for s in range(6)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.775, 0.55, 0.325])
    cosine = rates("cosine")
    assert cosine[2] == 1 and cosine[4] == pytest.approx(0.55) and cosine[3] > 0.775 > 0.55 > cosine[5] > 0.1


def test_biases_and_norms_do_not_decay() -> None:
    model = tiny.gpt2(layers=1)
    decayed, plain = adamw([model], 1e-3, 0.1, (0.9, 0.99)).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
