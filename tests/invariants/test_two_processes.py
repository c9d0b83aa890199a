"""Two processes train as one does, whatever divides the model, and what N began M finish.

The processes meet over gloo on the CPU. One launch runs every case below; each case is a whole training. Those of ZeRO are
there where DeepSpeed is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
import torch
from safetensors.torch import load_file

from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import EncodedDataset, read_encoded, write_encoded
from pipeline.losses.objective import FeatureTerm, LensTerm, Objective, new_projection
from pipeline.models.lens import logit_lens
from pipeline.stages import fit
from pipeline.stages import train as stage
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.checkpoint import state_of
from pipeline.training.launch import run_processes
from pipeline.training.loop import OnStep, Summary, train
from pipeline.training.sharded import Division, Sharding, Zero
from pipeline.training.step import Student, Teacher
from pipeline.training.stopping import Stopped, never

PAIRS = ((1, 2), (2, 4))
OBJECTIVES = {
    "sft": Objective(0.0),
    "kd": Objective(0.5, "forward_kl"),
    "mse": Objective(1.0, "forward_kl", features=FeatureTerm(1.0, PAIRS, "response", "teacher")),
    "distilllens": Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, True, "aligned", 0.5)),
}
# Seven rows by three: a last step of one row, which leaves the second process without any.
SETTINGS = tiny.settings(max_steps=7, batch_size=3, micro_batch_size=3)


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
DIVISIONS: dict[str, Division | None] = {
    "": None,
    "sharded": Sharding(),
    "zero 2": Zero({"stage": 2}),
    "zero 3": Zero({"stage": 3, "stage3_param_persistence_threshold": 0}),
}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        objective: name of the method.
        model: of `tiny`.
        division: of the model, one of DIVISIONS.
        checkpointing: of activations.
        micro_batch_size: rows of a forward pass.
        asked_at: the second process alone is asked to stop during this step, and a second training goes on from there.
        dropout: of the student.
    """

    objective: str
    model: str = "llama"
    division: str = ""
    checkpointing: bool = False
    micro_batch_size: int = 3
    asked_at: int | None = None
    dropout: float = 0.0


CASES = {
    "sft": Case("sft"),
    "mse with a projection": Case("mse", "gpt2"),
    "distilllens in micro-batches, stopped": Case("distilllens", micro_batch_size=1, asked_at=3),
    "sft with dropout, stopped": Case("sft", "gpt2", asked_at=4, dropout=0.1),
    "sft of an untied model, sharded": Case("sft", "qwen2", division="sharded"),
    "distilllens, sharded, in micro-batches, checkpointed": Case(
        "distilllens", division="sharded", checkpointing=True, micro_batch_size=1
    ),
    "mse, sharded, stopped": Case("mse", "gpt2", division="sharded", asked_at=4),
}
if HAS_DEEPSPEED:
    CASES |= {
        "mse, zero 2, stopped": Case("mse", "gpt2", division="zero 2", asked_at=4),
        "distilllens, zero 3, in micro-batches, checkpointed": Case(
            "distilllens", division="zero 3", checkpointing=True, micro_batch_size=1
        ),
        "sft of an untied model, zero 3, stopped": Case("sft", "qwen2", division="zero 3", asked_at=3),
    }
TO_RESUME = [name for name, case in CASES.items() if case.asked_at is not None and not case.dropout]


def rows(folder: Path) -> EncodedDataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(7):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(1, 300, (length,), generator=generator).tolist()
        examples.append(EncodedExample(f"e{index}", tuple(ids), int(torch.randint(1, length - 2, (1,), generator=generator))))
    if not (folder / "rows.arrow").exists():
        write_encoded(folder / "rows.arrow", examples)
    return read_encoded(folder / "rows.arrow")


def trained(case: Case, folder: Path, group: Any = None, stop_at: int | None = None) -> tuple[Summary, Student]:
    """Train a case in this process, or as one of a group; the steps' metrics are in metrics.jsonl."""
    objective = OBJECTIVES[case.objective]
    model = (
        tiny.gpt2(layers=3, seed=7, dropout=case.dropout)
        if case.model == "gpt2"
        else getattr(tiny, case.model)(layers=3, seed=7)
    )
    if case.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    other = tiny.llama(layers=6, seed=8)
    student = Student(model, logit_lens(model), new_projection(objective.features, 32, 32) if objective.features else None)
    steps: list[int] = []

    def watch(done: int, _: int) -> OnStep:
        steps.append(done)
        return lambda step, __: steps.append(step)

    def save_model(target: Path) -> None:
        weights = state_of(model)
        if group is None or group.first:
            model.save_pretrained(target, state_dict=weights)

    folder.mkdir(parents=True, exist_ok=True)
    summary = train(
        student, Teacher(OnlineTeacher(other), logit_lens(other)), objective, rows(folder.parent),
        replace(SETTINGS, micro_batch_size=case.micro_batch_size), pad_token_id=0, folder=folder, validate=lambda: {},
        save_model=save_model, watch=watch, stop=lambda: stop_at is not None and steps[-1] + 1 == stop_at, group=group,
    )  # fmt: skip
    return summary, student


def run_rank(task: str, folder: Path, group: Any, stop: Callable[[], bool]) -> None:
    """Every case, as one of two processes; the entry of the launch below."""
    assert not stop() and group.division == Sharding(reshard_after_forward=False)
    for name, plan in json.loads(task).items():
        own = replace(group, division=DIVISIONS[name.partition(", ")[2]])
        told = {"stage": stage.__name__, "plan": plan, "rate": 1e-3, "label": name}
        (folder / name).mkdir(exist_ok=True)
        fit.run_rank(json.dumps(told), folder / name, own, stop)
    for name, case in CASES.items():
        own = replace(group, division=DIVISIONS[case.division])
        if case.asked_at is not None:
            for copy in ("cut", "left"):
                with pytest.raises(Stopped):
                    trained(case, folder / f"{name} {copy}", own, case.asked_at if group.rank == 1 else None)
            trained(case, folder / f"{name} cut", own)
        if name in TO_RESUME:
            trained(case, folder / f"{name} begun alone", own)
        summary, student = trained(case, folder / name, own)
        if group.first:
            assert summary.peak_memory_gib > 0
        # Sharded parameters are put together by both; equal weights in both are what DDP keeps up.
        weights = torch.cat([tensor.detach().flatten() for tensor in state_of(student.model).values()])
        sums = group.gather(float(weights.double().sum()))
        assert sums[0] == sums[1], name


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes' work on every case."""
    folder, here = tmp_path_factory.mktemp("together"), Path(__file__).resolve().parent
    rows(folder)
    for name in TO_RESUME:
        with pytest.raises(Stopped):
            trained(CASES[name], folder / f"{name} begun alone", stop_at=CASES[name].asked_at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        task = json.dumps({name: stage._PLANS.dump_json(planned(folder, name)).decode() for name in FITS})
        run_processes("test_two_processes", task, folder, 2, Sharding(reshard_after_forward=False), "cases")
    return folder


# Whole fits, with validation by both criteria and a saved model: method and settings.
FITS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fit": ("mse", ()),
    "fit with an adapter": ("sft", ("train.lora={rank: 2, dropout: 0.0}",)),
    "fit on its own samples": (
        "kd",
        ("methods.kd.on_policy={fraction: 0.5, decoding: {max_new_tokens: 5}}", "cache.enabled=false"),
    ),
    "fit, sharded": ("distilllens", ("train.gradient_checkpointing=true",)),
    **({"fit, zero 3": ("distilllens", ())} if HAS_DEEPSPEED else {}),
}


def planned(folder: Path, name: str) -> stage.TrainPlan:
    """The plan of a fit whose inputs are there."""
    method, settings = FITS[name]
    common = ("train.seeds=[10]", "train.max_steps=6", "train.batch_size=5", "validation.every_steps=3", "validation.rows=5")
    return stages.training(stages.run_inputs(stages.planned(folder / "fits", *common, *settings)), method)


def records(folder: Path) -> list[tuple[int, dict[str, float]]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], {key: value for key, value in r["metrics"].items() if "per_second" not in key}) for r in found]


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [{"step": step, **values} for step, values in records(folder) if "train/loss" in values]


def equal(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == 7
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.dropout])
def test_two_processes_have_the_losses_of_one(together: Path, tmp_path: Path, name: str) -> None:
    alone, _ = trained(CASES[name], tmp_path / "alone")
    equal(steps_of(together / name), steps_of(tmp_path / "alone"))
    assert alone.tokens == json.loads((together / name / "checkpoint" / "state.json").read_text())["progress"]["tokens"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.asked_at is not None])
def test_all_stop_at_the_same_step_and_two_go_on_exactly(together: Path, name: str) -> None:
    stopped = together / f"{name} left"
    assert len(steps_of(stopped)) == CASES[name].asked_at
    assert steps_of(together / f"{name} cut") == steps_of(together / name)
    ours, theirs = (load_file(together / folder / "model" / "model.safetensors") for folder in (f"{name} cut", name))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", TO_RESUME)
def test_what_two_began_one_finishes_and_the_other_way_round(together: Path, name: str) -> None:
    trained(CASES[name], together / f"{name} left")
    equal(steps_of(together / f"{name} left"), steps_of(together / name))
    equal(steps_of(together / f"{name} begun alone"), steps_of(together / name))


@pytest.mark.parametrize("name", FITS)
def test_a_fit_of_two_processes_is_that_of_one(together: Path, tmp_path: Path, name: str) -> None:
    job, make = stage._fit_of(planned(together, name))
    fit._fit_here(job, 1e-3, make, tmp_path, name, never, None)
    ours, theirs = records(together / name), records(tmp_path)
    assert [step for step, _ in ours] == [step for step, _ in theirs] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert sum("dev/rouge_l" in values and "dev/loss" in values for _, values in ours) == 2
    for (_, found), (_, expected) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=0)
    counts = [json.loads((folder / "summary.json").read_text()) for folder in (together / name, tmp_path)]
    assert all(counts[0][key] == counts[1][key] for key in ("steps", "tokens", "best_step"))
    saved = [load_file(next((folder / "model").glob("*model.safetensors"))) for folder in (together / name, tmp_path)]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][key].shape == saved[1][key].shape and saved[0][key].any() for key in saved[0])
    assert sorted(file.name for file in (together / name / "model").iterdir()) == sorted(
        file.name for file in (tmp_path / "model").iterdir()
    )


SCRIPT = """
import sys
from pathlib import Path
import stages
from pipeline.errors import PipelineError
from pipeline.stages import train
plan = stages.planned(Path(sys.argv[1]), *sys.argv[3:], run_dir=Path(sys.argv[2]))
try:
    train.run(stages.training(plan, "distilllens"))
except PipelineError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_stage_killed_by_sigterm_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    settings = ("validation.select=loss", "train.seeds=[10]", "train.checkpoint_every=1000", "train.batch_size=5")
    settings = (*settings, "train.max_steps=100", "validation.every_steps=1000")
    place = stages.training(stages.run_inputs(stages.planned(tmp_path, *settings)), "distilllens").place
    metrics = place.path.with_name(place.path.name + ".partial") / "metrics.jsonl"
    done = 0
    for processes in (2, 1):
        stopped = ended_by_sigterm(tmp_path, metrics, done, *settings, f"train.launch.processes={processes}")
        assert stopped.returncode == 143 and re.search(r"stopped after step \d+ of 100, .*run the same command", stopped.stdout)
        before, done = done, trained_steps(metrics)
        assert before + 3 <= done < 100
    second = stage.run(stages.training(stages.planned(tmp_path, *settings), "distilllens"))
    whole = stages.planned(tmp_path, *settings, run_dir=tmp_path / "whole")
    first = stage.run(stages.training(stages.run_inputs(whole), "distilllens"))
    ours, theirs = steps_of(second.path), steps_of(first.path)
    assert [step["step"] for step in ours] == list(range(1, 101))
    for found, expected in zip(ours[:done], theirs, strict=False):
        assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    same = ("steps", "tokens", "best_step")
    assert [second.manifest.counts[key] for key in same] == [first.manifest.counts[key] for key in same]
    assert not (second.path / "processes").exists() and not (second.path / "checkpoint").exists()


def ended_by_sigterm(folder: Path, metrics: Path, done: int, *settings: str) -> subprocess.CompletedProcess[str]:
    """The stage in a process that gets SIGTERM a few steps after the first `done`."""
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(folder / "runs"), *settings]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while trained_steps(metrics) < done + 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, output)


def trained_steps(metrics: Path) -> int:
    return metrics.read_text().count('train/loss"') if metrics.exists() else 0
