"""Messages that no unit test meets, each provoked as cheaply as possible; the table of all messages checks what they say."""

from __future__ import annotations

import builtins
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiment
import gguf
import numpy as np
import pytest
import stages
import tiny
import torch
import yaml
from rows import read_examples

from pipeline import artifacts, cli
from pipeline.config import load_experiment
from pipeline.config.loading import load_sweep
from pipeline.config.methods import ProvenancePairs
from pipeline.data.sources import LocalSource
from pipeline.evaluation.generate import DecodingProtocol, EncodedPrompt, check_lengths
from pipeline.evaluation.kv_cache import _rows_of
from pipeline.evaluation.lens_view import _output_stem
from pipeline.locks import exclusive
from pipeline.models import lens, load
from pipeline.models.student import from_scratch
from pipeline.plan import check_inputs
from pipeline.processes import Outcome
from pipeline.remote import RemoteFolder, open_remote
from pipeline.stages import export, measure, prepare, seqkd
from pipeline.stages.evaluate import LoadedModel
from pipeline.stages.import_model import PackageFolder, plan_encoder
from pipeline.stages.objectives import resolve_pairs
from pipeline.stages.place import Place
from pipeline.store import Store
from pipeline.sweeps.accepted import _scores
from pipeline.sweeps.points import fixed_points, search
from pipeline.training.launch import _check, log_file

IDENTITY = "0123456789abcdef"
Provocation = Callable[[Path], object]


def artifact(folder: Path, stage: str = "train") -> Path:
    final = folder / stage / IDENTITY
    with artifacts.partial_folder(final) as partial:
        (partial / "a.txt").write_text("content")
        artifacts.commit(
            partial, final, stage=stage, fingerprint=IDENTITY, recipe={}, upstream={}, counts={}, seconds=0.0
        )  # fmt: skip
    return final


def unfinished(folder: Path) -> object:
    path = artifact(folder)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "complete": False, "sealed_by": "0" * 64}))
    return artifacts.open_or_fail(path)


def a_folder_for_a_manifest(folder: Path) -> object:
    (folder / "manifest.json").mkdir()
    return artifacts.open_or_fail(folder)


def no_room(folder: Path) -> None:
    with artifacts.partial_folder(folder / "x"):
        raise OSError(28, "No space left on device", str(folder / "x.partial" / "weights"))


def held_lock(folder: Path) -> None:
    with exclusive(folder / "x.lock"), exclusive(folder / "x.lock", wait_seconds=0):
        pass


def set_(*overrides: str) -> Provocation:
    """The tiny experiment with other settings, loaded."""
    return lambda folder: load_experiment(experiment.write(folder), overrides)


def plan(*overrides: str, **changes: Any) -> Provocation:
    """The tiny experiment with other settings, planned and looked at."""
    return lambda folder: check_inputs(stages.planned(folder, *overrides, **changes))


def prepared(*overrides: str) -> Provocation:
    """Its rows, too."""

    def work(folder: Path) -> None:
        planned = stages.planned(folder, *overrides)
        prepare.run(planned.data)
        for benchmark in planned.benchmarks:
            prepare.run_benchmark(benchmark)

    return work


def command(*arguments: str) -> Provocation:
    """The command line in this process, with `{}` for the folder; its message is raised again."""

    def work(folder: Path) -> None:
        experiment.write(folder)
        arguments_before = sys.argv
        sys.argv = ["distilllens", *(argument.replace("{}", str(folder)) for argument in arguments)]
        try:
            cli.app(sys.argv[1:], standalone_mode=False)
        finally:
            sys.argv = arguments_before

    return work


def taken_port(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        cli._check_port(other.getsockname()[1])


def a_file_in_the_way(folder: Path) -> None:
    (folder / "file").write_text("")
    cli._check_run_dir(folder / "file" / "runs")


def a_server_in_the_way(folder: Path) -> None:
    from flows.serve import own_server

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with own_server(folder, other.getsockname()[1]):
            pass


def a_long_line(folder: Path) -> object:
    path = folder / "rows.jsonl"
    path.write_bytes(b'{"instruction": "' + b"x" * (65 << 20) + b'", "output": "x"}\n')
    return read_examples(LocalSource(path))


def spoilt_model(change: Callable[[Path], None], use: Callable[[Path], object]) -> Provocation:
    def work(folder: Path) -> object:
        model = tiny.save(tiny.llama(layers=2), folder / "model")
        change(model)
        return use(model)

    return work


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None  # type: ignore[func-returns-value]


def another_width(model: Path) -> None:
    """A configuration with more layers than there are weights for."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


def without_end(model: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)


def an_odd_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "odd.gguf", "no-such-architecture")
    writer.add_tensor("weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    load.import_gguf(folder, "odd.gguf", folder / "target")


def an_odd_head(folder: Path) -> object:
    model = tiny.llama(layers=2)
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 300)))
    return lens.logit_lens(model)


def blank_teacher(folder: Path) -> object:
    planned = stages.planned(folder, methods={"seqkd": {"generation": {"decoding": {"max_new_tokens": 2}}}})
    prepare.run(planned.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seqkd, "decode", lambda *_: "")
        return seqkd.run(planned.generations[0])


def spoilt_part(folder: Path) -> object:
    (folder / "x.json").write_text(json.dumps({"rows": [], "sealed_by": "0" * 64}))
    return seqkd._read_part(folder / "x.json")


def without(module: str, work: Provocation) -> Provocation:
    """As where a package is not installed."""

    def blocked(folder: Path) -> object:
        real = builtins.__import__

        def refusing(name: str, *rest: Any, **named: Any) -> Any:
            if name.partition(".")[0] == module:
                raise ImportError(f"No module named {module!r}")
            return real(name, *rest, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "__import__", refusing)
            return work(folder)

    return blocked


def sweep(**changes: Any) -> Callable[[Path], Any]:
    def loaded(folder: Path) -> Any:
        path = folder / "sweep.yaml"
        content = {"name": "s", "experiment": "experiment.yaml", "axes": {"train.batch_size": [2, 4]}, **changes}
        path.write_text(yaml.safe_dump(content))
        return load_sweep(path)

    return loaded


def optuna(folder: Path) -> None:
    search(sweep(search={"kind": "optuna", "points": 2})(folder), lambda points: None, minimise=True)


def engine(kind: str) -> Provocation:
    def work(folder: Path) -> object:
        from flows.runners import task_runner

        return task_runner(sweep(engine=kind)(folder))

    return work


def pretrained_student(folder: Path) -> None:
    tiny.save(tiny.llama(layers=2), folder / "own")
    own = {"kind": "pretrained", "model": {"kind": "local", "path": str(folder / "own")}}
    stages.planned(folder, student=own, methods={"distilllens": {"lens": {"pairs": {"kind": "provenance", "count": 1}}}})


def unwritable(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.evaluation.lens_view.os.access", lambda *_: False)
        _output_stem(folder / "lens")


def another_in_the_store(folder: Path) -> None:
    path = artifact(folder / "store")
    path.rename(path.with_name("f" * 16))
    Store(str(folder / "store")).fetch("train", "f" * 16, folder / "runs" / "train" / ("f" * 16))


def spoilt_store(change: Callable[[Path], object]) -> Provocation:
    def work(folder: Path) -> None:
        change(artifact(folder / "store") / "a.txt")
        Store(str(folder / "store")).fetch("train", IDENTITY, folder / "runs" / "train" / IDENTITY)

    return work


def forgetful_store(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFolder, "read", lambda *_: b"something else")
        patch.setattr(RemoteFolder, "create", lambda *_: False)
        open_remote(str(folder / "forgetful"))


def ended(folder: Path, code: int, asked: bool = False) -> None:
    path = log_file(folder, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("the last words\n")
    _check([code, None], folder, "train kd s10", asked)


def trial(code: int, timed_out: bool = False, stopped: bool = False) -> Provocation:
    def work(folder: Path) -> None:
        from tasks.trial import _failure

        (folder / "log.txt").write_text("error: its last words\n")
        raise _failure("kd, weight=1", Outcome(code, 1.0, timed_out, stopped), folder / "log.txt", 600.0)

    return work


def several_protocols(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sweeps.accepted.read_scores", lambda path: {"protocol_hash": path.name})
        _scores("kd", {"general": {"1": "a", "2": "b"}}, folder)


def blank_references(folder: Path) -> None:
    metric = stages.planned(folder, "evaluation.metrics.calibration=true").trials[0].metrics[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "open", lambda self: artifacts.Artifact(folder, None))  # type: ignore[arg-type]
        patch.setattr(measure, "read_prompts", lambda path: [])
        patch.setattr(measure, "reference_rows", lambda *_: [])
        measure._calibrated(metric, lambda: LoadedModel(None, None))  # type: ignore[arg-type]


FAILURES: dict[str, Provocation] = {
    "a process is killed": lambda folder: ended(folder, -9),
    "processes are stopped": lambda folder: ended(folder, -15, asked=True),
    "a trial is stopped": trial(-15, stopped=True),
    "a trial is over its time": trial(-15, timed_out=True),
    "a trial is refused": trial(2),
    "a trial fails": trial(1),
}
GREEDY = DecodingProtocol(4, False, 1.0, 1.0, 0)
PROMPT = EncodedPrompt("p7", "", [1, 2, 3], ())
REFUSALS: dict[str, Provocation] = {
    "another artifact": lambda folder: artifacts.find(artifact(folder), "f" * 16),
    "no artifact": lambda folder: artifacts.open_or_fail(folder / "none", IDENTITY),
    "manifest unreadable": a_folder_for_a_manifest,
    "manifest incomplete": unfinished,
    "disk full": no_room,
    "lock held": held_lock,
    "name taken": set_("name=artifacts"),
    "path unprintable": set_('teacher.path="a\\x1bb"'),
    "override too deep": set_("a." * 40 + "b=1"),
    "halving": set_("train.halve_micro_batch_on_oom=true", "train.launch.processes=2"),
    "heads": set_("student={kind: scratch, layers: 2, hidden_size: 30, heads: 4}"),
    "too many rows a batch": plan("train.batch_size=1000"),
    "held out": prepared("data.held_out={dev: 20, test: 9}", "data.dev={kind: held_out, part: dev}"),
    "filtered": prepared("benchmarks.general.filter.min_reference_words=999"),
    "no row left": prepared("data.max_prompt_tokens=8"),
    "kept layers": plan("student.keep_layers=9"),
    "dropped layers": plan("student.drop_from=6"),
    "no compare": command("compare", "{}/experiment.yaml", "--run-dir", "{}/runs"),
    "no store": command("ui", "--run-dir", "{}/runs"),
    "port": taken_port,
    "run directory": a_file_in_the_way,
    "server port": a_server_in_the_way,
    "long line": a_long_line,
    "empty prompt": lambda _: check_lengths(
        None, [replace(PROMPT, input_ids=[])], DecodingProtocol(4, False, 1.0, 1.0, 0), None
    ),
    "no attention": lambda _: _rows_of(object()),  # type: ignore[arg-type]
    "out is no folder": lambda folder: ((folder / "file").write_text(""), _output_stem(folder / "file" / "x" / "lens")),
    "no tensor": spoilt_model(lambda _: None, lambda model: lens._read_weight(model, "no.such")),
    "odd head": an_odd_head,
    "weights missing": spoilt_model(another_width, load.load_model),
    "no end token": spoilt_model(without_end, load.load_tokenizer),
    "config no JSON": spoilt_model(written("config.json", "{"), load.load_model),
    "config no object": spoilt_model(written("config.json", "[]"), load.load_model),
    "odd GGUF": an_odd_gguf,
    "nothing to change": lambda _: from_scratch(tiny.gpt2(layers=2).config, {"num_key_value_heads": 2}, 0),
    "no package": lambda folder: plan_encoder(
        PackageFolder(kind="package", package="no_such_package", folder="x"), folder, "evaluation.metrics.similarity.model"
    ),
    "blank teacher": blank_teacher,
    "grid": lambda folder: fixed_points(sweep(axes={"a": list(range(999)), "b": list(range(999))})(folder)),
    "no optuna": without("optuna", optuna),
    "no dask": without("prefect_dask", engine("dask")),
    "no ray": without("prefect_ray", engine("ray")),
    "provenance": pretrained_student,
    "provenance later": lambda _: resolve_pairs(ProvenancePairs(kind="provenance"), 3, 6, None, "evaluation.lens_profile"),
    "spoilt part": spoilt_part,
    "unwritable": unwritable,
    "another in the store": another_in_the_store,
    "forgetful store": forgetful_store,
    "missing in the store": spoilt_store(Path.unlink),
    "damaged in the store": spoilt_store(lambda file: file.write_text("another")),
    "no checkpoint there": lambda folder: export._training_artifact(folder / "none"),
    "no checkpoint in it": lambda folder: export._training_artifact(folder),
    "no training": lambda folder: export._training_artifact(artifact(folder, "prepare")),
    "several protocols": several_protocols,
    "blank references": blank_references,
}
