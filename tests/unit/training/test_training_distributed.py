"""Several processes, as far as one process can tell: shares, blank passes, settings, signals, the processes' life and death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
import torch
import yaml

from pipeline.config import load_experiment
from pipeline.config.methods import Training
from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.errors import ConfigError, DataError, TrainingError
from pipeline.losses.objective import FeatureTerm, LensTerm, Objective, new_projection
from pipeline.models.lens import blocks, logit_lens
from pipeline.stages import fit, train
from pipeline.stages.fit import check_launch
from pipeline.teacher.online import OnlineTeacher
from pipeline.training import launch
from pipeline.training.feed import Order, Share, StepInput, blank, feed
from pipeline.training.launch import Job, ProcessLost, log_file, run_processes
from pipeline.training.sharded import Sharding, Zero, read_division
from pipeline.training.step import Student, Teacher, micro_batch_loss
from pipeline.training.stopping import note_every_sigterm, stop_on_sigterm

CPU = torch.device("cpu")
PAIRS = ((1, 2), (2, 4))
TWO = {"pairs": {"kind": "uniform", "count": 2}}
OBJECTIVES = {
    "sft": Objective(0.0),
    "kd": Objective(0.5, "forward_kl"),
    "mse": Objective(1.0, "forward_kl", features=FeatureTerm(1.0, PAIRS, "response", "teacher")),
    "distilllens": Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, True, "aligned")),
}


class Rows(list[EncodedExample]):
    @property
    def lengths(self) -> list[int]:
        return [len(row.input_ids) - 1 for row in self]


ROWS = Rows(EncodedExample(f"e{i}", tuple(range(3, 9 + 3 * (i % 4))), 2) for i in range(9))


def inputs(share: Share) -> list[StepInput]:
    order = Order(batch_size=4, micro_batch_size=1, seed=7, total=6)
    return list(feed(ROWS, order, 0, pad_token_id=0, device=CPU, source=None, layers=(), share=share))


def ids(step: StepInput) -> list[str]:
    return [name for part in step.micro_batches if sum(part.response_counts) for name in part.example_ids]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_divide_every_step_and_make_equally_many_passes(size: int) -> None:
    alone = inputs(Share())
    shares = [inputs(Share(rank, size)) for rank in range(size)]
    assert any(len(step.indices) == 1 for step in alone)  # nine rows by four: a last step that leaves processes without rows
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(name for part in parts for name in ids(part)) == sorted(ids(whole))
        assert {part.indices for part in parts} == {whole.indices}
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert all(part.micro_batches for part in parts)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_blank_pass_gives_zeros_for_every_parameter(name: str) -> None:
    objective, model, other = OBJECTIVES[name], tiny.llama(layers=3, seed=1), tiny.llama(layers=6, seed=2)
    projection = new_projection(objective.features, 32, 32) if objective.features else None
    student = Student(model, logit_lens(model), projection)
    batch = blank(collate(ROWS[:2], 0))
    terms = micro_batch_loss(
        student, Teacher(OnlineTeacher(other), logit_lens(other)), objective, batch, denominator=5, autocast=None
    )  # fmt: skip
    terms.total.backward()
    assert terms.total.item() == 0
    gradients = [parameter.grad for module in student.modules for parameter in module.parameters()]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["sft", "distilllens"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name: str, make: Any) -> None:
    def step(checkpointing: bool) -> tuple[float, list[torch.Tensor], int]:
        model, other = make(layers=3, seed=1), make(layers=6, seed=2)
        passes = [0]

        def count(*_: Any) -> None:
            passes[0] += 1

        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.train().base_model.get_submodule("layers.0" if make is tiny.llama else "h.0").mlp.register_forward_pre_hook(count)
        student, teacher = Student(model, logit_lens(model)), Teacher(OnlineTeacher(other), logit_lens(other))
        passes[0] = 0
        terms = micro_batch_loss(student, teacher, OBJECTIVES[name], collate(ROWS[:4], 0), denominator=40, autocast=None)
        terms.total.backward()
        return terms.total.item(), [parameter.grad for parameter in model.parameters()], passes[0]

    plain, checkpointed = step(False), step(True)
    assert (plain[2], checkpointed[2]) == (1, 2)
    assert checkpointed[0] == plain[0]
    torch.testing.assert_close(checkpointed[1], plain[1], rtol=0, atol=0)


def test_the_setting_turns_gradient_checkpointing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("validation.select=loss", "train.seeds=[10]", "train.max_steps=2")
    plan = stages.run_inputs(stages.planned(tmp_path, *settings, "train.gradient_checkpointing=true"))
    seen: list[bool] = []
    inner = fit.train

    def spy(student: Student, *arguments: Any, **named: Any) -> Any:
        seen.append(all(block.gradient_checkpointing for block in blocks(student.model)))
        return inner(student, *arguments, **named)

    monkeypatch.setattr(fit, "train", spy)
    train.run(stages.training(plan, "sft"))
    assert seen == [True]


def test_how_it_is_carried_out_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        return stages.training(stages.planned(tmp_path, *overrides), "distilllens").place.fingerprint

    ways = ("train.launch.processes=2", "train.launch={processes: 3, strategy: fsdp}", "train.gradient_checkpointing=true")
    assert len({fingerprint(), *map(fingerprint, ways)}) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.launch.processes=0"], "train.launch.processes: .*greater than or equal to 1"),
        (["train.launch.processes=7"], "launch.processes 7 is larger than batch_size 6"),
        (["train.launch.strategy=zero"], "train.launch.strategy: .*'ddp', 'fsdp'"),
        (["train.launch.config=a.yaml"], "train.launch: config a.yaml is for fsdp or deepspeed, but strategy is ddp"),
        (["train.launch={processes: 2, strategy: fsdp}", "train.lora={}"], "launch.strategy fsdp trains every parameter"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages.planned(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("strategy", "method", "settings", "message"),
    [
        (
            "ddp",
            "distilllens",
            {"lens": {**TWO, "mask_layout": "official"}},
            "methods.x.lens.mask_layout: official depends on which rows",
        ),
        ("ddp", "mse", {"features": {**TWO, "positions": "all"}}, "methods.x.features.positions: all depends on which rows"),
        ("fsdp", "kd", {"on_policy": {"fraction": 0.5}}, "methods.x.on_policy samples from the whole student"),
    ],
)
def test_methods_that_processes_would_change_are_refused(
    tmp_path: Path, strategy: str, method: str, settings: dict[str, Any], message: str
) -> None:
    def plan(processes: int) -> None:
        launch = f"train.launch={{processes: {processes}, strategy: {strategy}}}"
        methods = {"x": {"kind": method, **settings}}
        stages.planned(tmp_path, launch, "cache.enabled=false", methods=methods)

    plan(1)
    with pytest.raises(ConfigError, match=message):
        plan(2)


def test_more_processes_than_devices_are_refused_unless_the_run_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.launch.processes=2", "methods={sft: null}", "train.seeds=[10]")
    check_launch(Training(max_steps=1, launch={"processes": 2}), "train")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_launch(Training(max_steps=1), "train")
    with pytest.raises(ConfigError, match="train.launch.processes: 2 processes, but this machine has 1 CUDA devices"):
        stages.planned(tmp_path, *settings)
    with pytest.raises(ConfigError, match="teacher_finetune.train.launch.processes: 2 processes"):
        stages.planned(tmp_path, teacher_finetune={"train": {"max_steps": 1, "launch": {"processes": 2}}})
    one = stages.training(stages.planned(tmp_path, *settings[1:]), "sft").place
    one.path.mkdir(parents=True)
    stages.planned(tmp_path, *settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "fsdp.yaml: not YAML that can be used here"),
        ("mixed_precision: bf16", "has no fsdp_config"),
        ("fsdp_config: {fsdp_reshard_after_forward: false}", "fsdp_version is missing"),
        ("fsdp_config: {fsdp_version: 1}", "fsdp_version is 1; allowed: 2"),
        ("fsdp_config: {fsdp_version: 2, fsdp_offload_params: true}", "fsdp_offload_params is True; allowed: False"),
        ("fsdp_config: {fsdp_version: 2, fsdp_use_orig_params: true}", "fsdp_use_orig_params is not supported"),
    ],
)
def test_a_configuration_of_accelerate_that_is_not_carried_out_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"train.launch.config: .*{message}"):
        stages.planned(tmp_path, f"train.launch={{processes: 2, strategy: fsdp, config: {file}}}")


def test_a_configuration_of_accelerate_is_read(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.yaml"
    options = {"fsdp_version": 2, "fsdp_reshard_after_forward": False, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    file.write_text(yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": options}))
    assert read_division("fsdp", file, "x") == Sharding(reshard_after_forward=False)
    file.write_text(yaml.safe_dump({"fsdp_config": {"fsdp_version": 2}}))
    assert read_division("fsdp", file, "x") == read_division("fsdp", None, "x") == Sharding(reshard_after_forward=True)
    assert read_division("ddp", None, "x") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "strategy deepspeed needs DeepSpeed's JSON file"),
        ("{}", "needs zero_optimization.stage 2 or 3"),
        ('{"zero_optimization": {"stage": 1}}', "needs zero_optimization.stage 2 or 3"),
        (
            '{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}',
            "gradient_clipping is not supported: this pipeline sets",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
            "zero_optimization.offload_optimizer is not",
        ),
    ],
)
def test_a_configuration_of_deepspeed_that_is_not_carried_out_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(content or "")
    config = "" if content is None else f", config: {file}"
    with pytest.raises(ConfigError, match=f"train.launch.config: .*{message}"):
        stages.planned(tmp_path, f"train.launch={{processes: 2, strategy: deepspeed{config}}}")


def test_deepspeed_is_read_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}')
    found = read_division("deepspeed", file, "x")
    assert found == Zero({"stage": 3}) and found.stage == 3
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="train.launch.strategy: deepspeed is not installed; pip install"):
        check_launch(Training(max_steps=1, launch={"processes": 2, "strategy": "deepspeed", "config": file}), "train")


@pytest.fixture
def sigterms() -> Iterator[list[int]]:
    """SIGTERM, as it arrives where nothing else notes it."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_the_first_sigterm_is_noted_and_the_second_does_what_it_did_before(sigterms: list[int]) -> None:
    with stop_on_sigterm() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() and sigterms == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert sigterms == [signal.SIGTERM]
    with stop_on_sigterm() as asked:
        assert not asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert sigterms == [signal.SIGTERM] * 2


def test_a_process_of_several_notes_every_signal(sigterms: list[int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        asked = note_every_sigterm()
        assert not asked()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert asked() and sigterms == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    """Processes that finish what they do on SIGTERM; the parent is interrupted while it waits for them."""
    busy = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(0.3), sys.exit(143)))"
    busy += "; print(1, flush=True); time.sleep(99)"
    output = tmp_path / "rank-0.log"
    with output.open("wb") as stream:
        started = [subprocess.Popen([sys.executable, "-c", busy], stdout=stream, start_new_session=True) for _ in range(2)]
    waiting(lambda: output.read_bytes().count(b"1") == 2)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launch._wait(started, lambda: False, launch._Relay(output))
    assert [process.returncode for process in started] == [143, 143]


def test_in_a_search_a_lost_process_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("train.launch.processes=2", "train.learning_rate=[1e-3, 1e-2]", "validation.select=loss")
    plan = stages.run_inputs(stages.planned(tmp_path, *settings, methods={"sft": None}))
    raised: list[Exception] = [ProcessLost("out of memory"), TrainingError("step 3 is not finite"), ProcessLost("killed")]

    def broken(entry: str, task: str, folder: Path, processes: int, *_: Any) -> None:
        assert (entry, processes) == ("pipeline.stages.fit", 2)
        raise raised.pop(0)

    monkeypatch.setattr(fit, "run_processes", broken)
    with pytest.raises(ProcessLost, match="out of memory"):
        train.run(stages.training(plan, "sft"))
    with pytest.raises(ProcessLost, match="killed"):
        train.run(stages.training(plan, "sft"))
    partial = stages.training(plan, "sft").place.path
    found = json.loads((partial.with_name(partial.name + ".partial") / "candidates" / "0" / "summary.json").read_text())
    assert found["failed"] == "step 3 is not finite"


def test_in_another_thread_signals_are_left_alone(sigterms: list[int]) -> None:
    handlers = []

    def work() -> None:
        with stop_on_sigterm() as asked:
            handlers.append((signal.getsignal(signal.SIGTERM), asked()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(before, False)]


def test_the_experiments_file_round_trips_with_a_launch(tmp_path: Path) -> None:
    plan = stages.planned(tmp_path, "train.launch={processes: 2, strategy: fsdp}")
    plan.write_config()
    assert load_experiment(plan.config_path).train.launch == plan.experiment.train.launch


ENTRY = """
import os, sys, time
from pathlib import Path
from pipeline.errors import DataError


def run_rank(task, folder, group, stop):
    (folder / f"pid-{group.rank}").write_text(str(os.getpid()))
    if task == "refuse" and group.rank == 1:
        raise DataError("row 3 is empty")
    if task == "die" and group.rank == 1:
        print("about to break", file=sys.stderr, flush=True)
        raise RuntimeError("no such thing")
    (folder / f"sum-{group.rank}").write_text(repr((group.sum([group.rank + 1.5, 2.0]), group.gather(3.0 + group.rank))))
    if task == "wait":
        time.sleep(600)
"""


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rank_entry.py").write_text(ENTRY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "rank_entry"


def test_what_a_process_raises_is_raised_and_what_kills_it_is_shown(tmp_path: Path, entry: str) -> None:
    folder = tmp_path / "work"
    with pytest.raises(DataError, match="^row 3 is empty$"):
        run_processes(entry, "refuse", folder, 2, None, "train sft")
    with pytest.raises(
        ProcessLost, match=r"(?s)train sft: process 1 of 2 ended with code 1; .*rank-1.log.*RuntimeError: no such"
    ):
        run_processes(entry, "die", folder, 2, None, "train sft")
    assert "about to break" in log_file(folder, 1).read_text()
    assert not any(alive(int((folder / f"pid-{rank}").read_text())) for rank in (0, 1))


def test_processes_add_up_and_die_with_their_parent(tmp_path: Path, entry: str) -> None:
    call = f"run_processes({entry!r}, 'wait', Path({str(tmp_path)!r}), 2, None, 'x')"
    call = f"from pathlib import Path; from pipeline.training.launch import run_processes; {call}"
    parent = subprocess.Popen([sys.executable, "-c", call])
    found = [tmp_path / f"sum-{rank}" for rank in (0, 1)]
    try:
        waiting(lambda: all(file.exists() and file.read_text() for file in found))
        assert {file.read_text() for file in found} == {"([4.0, 4.0], [3.0, 4.0])"}
        children = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
        assert all(map(alive, children))
    finally:
        parent.kill()
        parent.wait()
    waiting(lambda: not any(map(alive, children)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waiting(done: Any) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("division", [None, Sharding(reshard_after_forward=False), Zero({"stage": 3})])
def test_a_job_is_read_as_it_was_written(tmp_path: Path, division: Any) -> None:
    job = Job("entry", '{"a": 1}', tmp_path, 2, division, tmp_path / "meeting", 17)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = stages.training(stages.planned(tmp_path, "train.launch.processes=2"), "distilllens")
    stages.run_inputs(stages.planned(tmp_path))
    job, _ = train.unpack(train._fit_of(plan)[0].plan)
    assert (job.label, job.seed, job.training.launch.processes) == (plan.place.label, 10, 2)
    assert json.loads(job.plan)["place"]["fingerprint"] == plan.place.fingerprint
