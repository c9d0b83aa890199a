"""Export: a folder that transformers loads without this project, with a card that says what the runs say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ConfigError, PipelineError
from pipeline.models.lora import is_adapter
from pipeline.plan import Plan
from pipeline.stages import evaluate, export, finetune_teacher, prepare, train
from pipeline.stages.export import export_checkpoint, interval

IDS = [3, 14, 15, 92, 65, 35, 89]
METHODS = {"distilllens": {"lens": {"pairs": {"kind": "uniform", "count": 2}}}, "sft": None, "seqkd": None}
SETTINGS = ("train.seeds=[10]", "train.max_steps=2", "validation.select=loss")
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    logits = model(ids).logits
generated = model.generate(ids, max_new_tokens=2, do_sample=False)
print(json.dumps({
    "logits": logits[0].tolist(), "ids": tokenizer("the cat sat")["input_ids"], "new": generated.shape[1] - ids.shape[1],
    "missing": sorted(info["missing_keys"]), "end": model.generation_config.eos_token_id,
    "project": sorted(name for name in sys.modules if name.partition(".")[0] in ("pipeline", "tasks", "flows")),
}))
"""


def loaded_elsewhere(folder: Path, cwd: Path) -> dict[str, Any]:
    """What a process that does not see this project makes of a folder."""
    command = [sys.executable, "-I", "-c", LOAD, str(folder), json.dumps(IDS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([IDS])).logits[0]


@dataclass(frozen=True)
class Runs:
    """A finished tiny experiment."""

    plan: Plan
    distilled: Artifact

    def card(self, to: Path, method: str = "distilllens") -> str:
        export_checkpoint(stages.training(self.plan, method).place.path, to)
        return (to / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("export")
    plan = stages.run_inputs(stages.planned(folder, *SETTINGS, methods=METHODS))
    plan.write_config()
    for benchmark in plan.benchmarks:
        prepare.run_benchmark(benchmark)
    for trial in plan.trials:
        if trial.train is not None:
            train.run(trial.train)
        if trial.method != "sft":
            loaded = evaluate.load_subject(trial.evaluations[0].subject)
            for plan_ in trial.evaluations:
                evaluate.run(plan_, loaded)
    return Runs(plan, stages.training(plan, "distilllens").place.open())


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_folder_loads_without_this_project_with_the_same_logits(runs: Runs, tmp_path: Path) -> None:
    to = tmp_path / "out" / "model"
    assert export_checkpoint(runs.distilled.path, to) == to
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in to.iterdir()
    }
    assert not list(to.glob("*.bin")) and list(to.parent.iterdir()) == [to]
    assert len({file.stat().st_mode for file in to.iterdir()}) == 1
    found = loaded_elsewhere(to, tmp_path)
    assert found["project"] == [] and found["missing"] == []
    assert torch.equal(torch.tensor(found["logits"]), logits(runs.distilled.path / "model"))
    assert found["ids"] == tiny.tokenizer()("the cat sat")["input_ids"]
    assert found["end"] == tiny.tokenizer().eos_token_id and 1 <= found["new"] <= 2


def test_a_checkpoint_of_training_loads_the_same_way(runs: Runs, tmp_path: Path) -> None:
    found = loaded_elsewhere(runs.distilled.path / "model", tmp_path)
    assert found["project"] == [] and found["missing"] == []
    assert torch.equal(torch.tensor(found["logits"]), logits(runs.distilled.path / "model"))


def test_the_model_folder_names_its_artifact(runs: Runs, tmp_path: Path) -> None:
    export_checkpoint(runs.distilled.path, tmp_path / "a")
    export_checkpoint(runs.distilled.path / "model", tmp_path / "b")
    assert (tmp_path / "a" / "README.md").read_text() == (tmp_path / "b" / "README.md").read_text()


def test_nothing_in_the_folder_tells_where_it_was_made(runs: Runs, tmp_path: Path) -> None:
    export_checkpoint(runs.distilled.path, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert str(tmp_path.parent).encode() not in content and b"/artifacts/" not in content, file.name


def test_the_card_holds_the_scores_with_intervals(runs: Runs, tmp_path: Path) -> None:
    card = runs.card(tmp_path / "out")
    trials = {trial.method: trial for trial in runs.plan.trials}
    for index, benchmark in enumerate(("general", "tasks")):
        evaluation = trials["distilllens"].evaluations[index]
        scores = evaluate.read_scores(evaluation.place.path)
        low, high = interval(evaluation.place.path / evaluate.GENERATIONS)
        rivals = [trials[name].evaluations[index].place.path for name in ("untrained", "teacher")]
        others = [evaluate.read_scores(rival)["rouge_l"]["mean"] for rival in rivals]
        assert (
            f"| {benchmark} | {scores['rows']} | {scores['rouge_l']['mean']:.2f} | {low:.2f} to {high:.2f} | "
            f"{scores['rouge_l']['std']:.2f} | {scores['exact_match']['mean']:.2f} | {others[0]:.2f} | {others[1]:.2f} |"
        ) in card
        assert f"{benchmark} (`{evaluation.protocol_hash}`)" in card
    assert "decoding seeds 1, 2" in card and "at most 8 new tokens" in card
    results = front(card)["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["general", "tasks"]


def test_the_card_holds_method_settings_data_and_inputs(runs: Runs, tmp_path: Path) -> None:
    card = runs.card(tmp_path / "out")
    counts = runs.plan.data.place.open().manifest.counts["train"]
    for text in (
        "teacher (a local folder)", "train.jsonl (a local file)", "dev.jsonl (a local file)", "general.jsonl (a local file)",
        "not known: a local file; check it", f"{counts['kept']} of {counts['rows']} rows kept", "2 optimiser steps",
        "| `training.learning_rate` | 0.001 |", "| `method.lens.pairs.count` | 2 |", "| `alpha` | 1 |",
        "| template | alpaca@1 |",
        "arXiv 2602.13567", "@misc{distilllens", "### Instruction:", runs.distilled.fingerprint, "seed 10", "Limits",
        "without the teacher's layers",
    ):  # fmt: skip
        assert text in card, text
    metadata = front(card)
    assert metadata["license"] == "other" and metadata["library_name"] == "transformers"
    assert metadata["tags"] == ["knowledge-distillation", "distilllens"]
    assert "base_model" not in metadata and "datasets" not in metadata


def test_a_method_without_a_teacher_names_none_and_without_evaluations_says_so(runs: Runs, tmp_path: Path) -> None:
    card = runs.card(tmp_path / "out", "sft")
    assert "without a teacher" in card and "No evaluation of this checkpoint was found" in card
    assert "model-index" not in front(card) and "metrics" not in front(card)


def test_responses_of_the_teacher_are_told(runs: Runs, tmp_path: Path) -> None:
    card = runs.card(tmp_path / "out", "seqkd")
    assert "responses that the teacher wrote" in card and "| teacher | teacher (a local folder) |" in card
    assert "| `responses.decoding.temperature` | 1 |" in card


def test_missing_inputs_are_called_not_known(runs: Runs, tmp_path: Path) -> None:
    alone = tmp_path / "runs" / "artifacts" / "train" / runs.distilled.fingerprint
    shutil.copytree(runs.distilled.path, alone)
    export_checkpoint(alone, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No evaluation of this checkpoint was found" in card and card.count("not known") > 4
    assert torch.equal(logits(tmp_path / "out"), logits(runs.distilled.path / "model"))
    export_checkpoint(alone, tmp_path / "there", run_dir=runs.plan.run_dir)
    assert (tmp_path / "there" / "README.md").read_text() == runs.card(tmp_path / "here")


def test_a_damaged_evaluation_is_named(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.plan.run_dir, tmp_path / "runs")
    evaluation = first_evaluation(runs.plan)
    (tmp_path / "runs" / "artifacts" / "evaluate" / evaluation / evaluate.GENERATIONS).unlink()
    with pytest.raises(ArtifactError, match=f"{evaluation}/{evaluate.GENERATIONS}.*found no file"):
        export_checkpoint(runs.distilled.path, tmp_path / "out", tmp_path / "runs")
    assert not (tmp_path / "out").exists()


def first_evaluation(plan: Plan) -> str:
    """Fingerprint of the distilled student's first evaluation."""
    return next(trial for trial in plan.trials if trial.method == "distilllens").evaluations[0].place.fingerprint


def test_rows_of_the_hub_and_of_the_corpus_are_named_with_their_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, other = "a" * 40, "b" * 40
    (tmp_path / "hub" / "datasets--MiniLLM--dolly" / "snapshots" / other).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fixed = export.HubData(kind="hub", repo="databricks/databricks-dolly-15k", file="d.jsonl", revision=commit)
    branch = export.HubData(kind="hub", repo="MiniLLM/dolly", file="raw.jsonl", revision="main", skip=1000)
    for ref, seen, terms in ((fixed, commit, "cc-by-sa-3.0"), (branch, other, "cc-by-sa-3.0")):
        ((digest, named),) = export._rows_name(ref).items()
        assert digest == export.sources.source_digest(export.sources.HubSource(ref.repo, ref.file, seen, ref.first, ref.skip))
        assert named.licence.identifier == terms and named.repo == ref.repo and seen[:12] in named.origin
    unseen = export.HubData(kind="hub", repo="MiniLLM/uinst", file="raw.jsonl", revision="main")
    assert export._rows_name(unseen) == {}
    ((_, corpus),) = export._rows_name(export.BundledData(kind="bundled", name="train")).items()
    assert corpus.licence.identifier == "cc0-1.0" and corpus.repo is None


def test_models_of_the_hub_and_fine_tuned_ones_are_named(tmp_path: Path) -> None:
    plan = stages.planned(
        tmp_path, *SETTINGS, methods={"kd": None}, teacher_finetune={"train": {"max_steps": 1, "batch_size": 6}}
    )
    plan.write_config()
    prepare.run(plan.data)
    assert plan.finetune is not None
    finetune_teacher.run(plan.finetune)
    lookup = export._Lookup(plan.run_dir / "artifacts", export._named_inputs(plan.run_dir))
    hub = lookup.model("teacher", f"hub:Qwen/Qwen2.5-1.5B@{'c' * 40}")
    assert (hub.repo, hub.licence.identifier) == ("Qwen/Qwen2.5-1.5B", "apache-2.0")
    assert lookup.model("teacher", f"hub:some/model@{'c' * 40}").licence.identifier is None
    tuned = lookup.model("teacher", plan.finetune.place.fingerprint)
    assert tuned.described == "teacher (a local folder; fine-tuned on the training rows)"


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    plan = stages.planned(tmp_path, *SETTINGS, "train.lora.rank=2", "train.learning_rate=1e-2", methods={"kd": None})
    artifact = train.run(stages.training(stages.run_inputs(plan), "kd"))
    to = export_checkpoint(artifact.path, tmp_path / "out")
    assert is_adapter(artifact.path / "model") and not is_adapter(to) and not list(to.glob("adapter*"))
    subject = next(trial for trial in plan.trials if trial.method == "kd").evaluations[0].subject
    with torch.no_grad():
        merged = evaluate.load_subject(subject).model(torch.tensor([IDS])).logits[0]
    assert torch.equal(torch.tensor(loaded_elsewhere(to, tmp_path)["logits"]), merged)
    assert not torch.allclose(merged, logits(plan.student.place.path), atol=1e-4)
    shutil.rmtree(plan.student.place.path)
    with pytest.raises(ArtifactError, match="give its --run-dir"):
        export_checkpoint(artifact.path, tmp_path / "again")


def test_a_place_that_is_taken_is_refused_and_an_empty_one_used(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for to, what in (("full", "is not empty"), ("file", "is a file"), ("file/below", "cannot be written")):
        with pytest.raises(ConfigError, match=what):
            export_checkpoint(runs.distilled.path, tmp_path / to)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    export_checkpoint(runs.distilled.path, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("kind", ["nothing", "empty", "model", "student", "unfinished", "unfinished model", "damaged"])
def test_what_is_no_finished_training_is_refused(runs: Runs, tmp_path: Path, kind: str) -> None:
    train_folder = tmp_path / "artifacts" / "train"
    train_folder.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    given, message = {
        "nothing": (tmp_path / "nothing", "no such folder"),
        "empty": (tmp_path / "empty", "no checkpoint of a training"),
        "model": (tmp_path / "plain", "no checkpoint of a training"),
        "student": (runs.plan.student.place.path, "stage 'student'"),
        "unfinished": (train_folder / "abc", "not finished"),
        "unfinished model": (train_folder / "abc.partial" / "model", "not finished"),
        "damaged": (train_folder / "f", "checksum differs"),
    }[kind]
    if kind == "model":
        tiny.save(tiny.llama(layers=1), given)
    if kind.startswith("unfinished"):
        (train_folder / "abc.partial" / "model").mkdir(parents=True)
    if kind == "damaged":
        shutil.copytree(runs.distilled.path, given)
        weights = given / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=message) as caught:
        export_checkpoint(given, tmp_path / "out")
    assert isinstance(caught.value, PipelineError) and not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "write_text_atomically", fail)
    with pytest.raises(OSError, match="no space"):
        export_checkpoint(runs.distilled.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_interval_is_over_prompts(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def write(name: str, values: list[list[float]]) -> Path:
        rows = [(str(i), value) for i, prompt in enumerate(values) for value in prompt]
        table = pa.table({"id": [i for i, _ in rows], "rouge_l": [value for _, value in rows]})
        parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    # Seeds that differ within a prompt do not widen it, prompts that differ do.
    assert interval(write("equal", [[0.0, 100.0]] * 10)) == (50.0, 50.0)
    low, high = interval(write("apart", [[0.0, 0.0]] * 50 + [[100.0, 100.0]] * 50))
    # Normal approximation of a mean of 100 halves: 50 ± 1.96 · 5.
    assert low == pytest.approx(40.2, abs=1.5) and high == pytest.approx(59.8, abs=1.5)
    assert interval(tmp_path / "apart") == (low, high)
