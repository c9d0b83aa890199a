"""The comparison of a tiny experiment: files, baseline, limits, and reports with little in them."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import stages
import tiny

from pipeline.artifacts import MANIFEST, Artifact, commit
from pipeline.config.experiment import Experiment
from pipeline.errors import ConfigError
from pipeline.plan import Plan
from pipeline.reporting.record_files import FILES, read_records
from pipeline.reporting.report import write_report
from pipeline.stages import compare, prepare, report, student
from pipeline.stages.compare import ComparePlan, Trial, plan_comparison
from pipeline.stages.evaluate import GENERATIONS

METHODS = {"sft": None, "kd": None, "rkl": None}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Three methods, two training seeds, evaluated; three prompts of the benchmark `tasks` are training rows."""
    folder = tmp_path_factory.mktemp("compare")
    tiny.write_rows(folder / "seen.jsonl", 3)
    planned = stages.planned(
        folder, "validation.select=loss", "train.max_steps=2", methods=METHODS,
        benchmarks={
            "general": {"source": {"path": str(folder / "general.jsonl")}},
            "tasks": {"source": {"path": str(folder / "seen.jsonl")}},
        },
        evaluation={"decoding": {"max_new_tokens": 4}, "seeds": [1, 2]}, cache={"enabled": False},
    )  # fmt: skip
    prepare.run(planned.data)
    student.run(planned.student)
    for benchmark in planned.benchmarks:
        prepare.run_benchmark(benchmark)
    stages.run_trials(planned)
    return planned


@pytest.fixture(scope="module")
def made(plan: Plan) -> Artifact:
    return compare.run(plan.comparison)


def planned(plan: Plan, trials: Sequence[Trial], run_dir: Path, baseline: str | None = None) -> ComparePlan:
    return plan_comparison(plan.experiment, trials, run_dir / "artifacts", run_dir, baseline)


def page(comparison: ComparePlan) -> str:
    return (compare.run(comparison).path / "report.html").read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', text, re.DOTALL)
    return found[1] if found else ""


def test_every_file_is_there(made: Artifact) -> None:
    drawn = {f"figures/{name}.{kind}" for name in ("scores", "effects", "curves", "cost") for kind in ("png", "svg")}
    texts = {"differences.csv", "headline.txt", "table.md", "table.tex", "report.html"}
    expected = {"results.csv", "results.parquet", *FILES, *texts, *drawn}
    assert set(made.manifest.files) == expected
    with (made.path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    table = parquet.read_table(made.path / "results.parquet").to_pylist()
    assert [row["method"] for row in rows] == [row["method"] for row in table]
    assert [float(row["mean"]) for row in rows] == pytest.approx([row["mean"] for row in table], abs=1e-4)


def test_kd_is_the_baseline_and_the_teacher_is_not_tested(made: Artifact) -> None:
    text = (made.path / "report.html").read_text(encoding="utf-8")
    effects = section(text, "effects")
    rows = re.findall(r'<th scope="row">(.*?)</th>', effects)
    assert rows == ["rkl", "sft", "rkl", "sft"]
    assert "Every method against kd" in effects and "http" not in text


def test_contaminated_prompts_are_counted_and_named(made: Artifact) -> None:
    limits = section((made.path / "report.html").read_text(encoding="utf-8"), "limits")
    assert "of the 3 prompts of tasks, 3 have an instruction that occurs in the training rows too, 3 of them" in limits
    assert re.search(r"Responses end at 4 new tokens: \d+ % .*of a model&#39;s responses were cut there", limits)
    assert "0 of 24 training rows were cut at 512 tokens" in limits and "2 training seeds" in limits


def test_generations_name_rule_and_models(made: Artifact) -> None:
    text = section((made.path / "report.html").read_text(encoding="utf-8"), "generations")
    assert "The 7 prompts with the largest gains over the baseline" in text
    shown = re.findall(r"<summary>((?:general|tasks) · .*?)</summary>", text)
    assert len(shown) == 8  # no more prompts than there are
    assert text.count("kd s10") == 8 and "s20" not in text


def test_provenance_has_every_fingerprint(plan: Plan, made: Artifact) -> None:
    text = section((made.path / "report.html").read_text(encoding="utf-8"), "provenance")
    prints = [made.fingerprint, *(place.fingerprint for trial in plan.trials for place in trial.places)]
    assert all(value in text for value in prints)
    assert all(evaluation.protocol_hash in text for evaluation in plan.trials[0].evaluations)


def test_one_seed_says_what_it_cannot_say(plan: Plan, tmp_path: Path) -> None:
    text = page(planned(plan, [trial for trial in plan.trials if trial.seed in (None, 10)], tmp_path))
    assert "One training seed for every method" in section(text, "limits")
    assert "holds for these checkpoints only" in text or "nothing to compare" in text


def test_only_untrained_models(plan: Plan, tmp_path: Path) -> None:
    text = page(planned(plan, [trial for trial in plan.trials if trial.train is None], tmp_path))
    assert "No method was trained here" in text and section(text, "effects") == "" and section(text, "curves") == ""
    assert len(re.findall("<summary>(?:general|tasks) · random</summary>", text)) == 8
    assert "Every trained row" not in text and "± is the" not in text and "largest gains" not in text


def test_a_single_method_has_nothing_to_be_compared_with(plan: Plan, tmp_path: Path) -> None:
    text = page(planned(plan, [trial for trial in plan.trials if trial.method in ("teacher", "kd")], tmp_path))
    assert "kd is the only method" in text and section(text, "effects") == ""
    assert "(highest)" not in text


@pytest.mark.parametrize(
    ("seeds", "who"), [((20,), "sft s20 on general"), ((10, 20), "general: sft has 4 prompts and kd has 5")]
)
def test_rows_that_cannot_be_paired_are_told_and_not_compared(
    plan: Plan, tmp_path: Path, seeds: tuple[int, ...], who: str
) -> None:
    def shortened(trial: Trial) -> Trial:
        odd, *others = trial.evaluations
        copy, fresh = tmp_path / trial.name, tmp_path / f"{trial.name}.fresh"
        shutil.copytree(odd.place.path, fresh, ignore=shutil.ignore_patterns(MANIFEST))
        parquet.write_table(parquet.read_table(fresh / GENERATIONS).slice(2), fresh / GENERATIONS)  # one prompt fewer
        commit(fresh, copy, stage="evaluate", fingerprint="0" * 16, recipe={}, upstream={}, counts={}, seconds=0.0)
        moved = replace(odd, place=replace(odd.place, path=copy, fingerprint="0" * 16))
        return replace(trial, evaluations=(moved, *others))

    trials = [shortened(trial) if (trial.method, trial.seed in seeds) == ("sft", True) else trial for trial in plan.trials]
    text = page(planned(plan, trials, tmp_path))
    assert "The methods are not compared" in text and section(text, "effects") == ""
    told = section(text, "limits")
    assert "not compared prompt by prompt: " in told and "(highest)" not in text
    assert who in told


def test_the_baseline_is_part_of_the_recipe(plan: Plan, tmp_path: Path) -> None:
    default, other = planned(plan, plan.trials, tmp_path), planned(plan, plan.trials, tmp_path, "sft")
    assert (default.baseline, other.baseline) == ("kd", "sft")
    assert default.place.fingerprint != other.place.fingerprint
    assert planned(plan, plan.trials, tmp_path, "kd").place.fingerprint == default.place.fingerprint


def test_without_kd_the_first_trained_row_is_the_baseline(plan: Plan, tmp_path: Path) -> None:
    trials = [trial for trial in plan.trials if trial.method != "kd"]
    assert planned(plan, trials, tmp_path).baseline == "rkl"
    assert planned(plan, trials[:2], tmp_path).baseline is None


def test_a_method_stands_for_its_first_row(plan: Plan, tmp_path: Path) -> None:
    trials = [replace(trial, variant="lr=1") if trial.method == "kd" else trial for trial in plan.trials]
    found = planned(plan, trials, tmp_path, "kd")
    assert (found.baseline, found.missing_baseline) == ("kd lr=1", None)


def test_a_baseline_without_trials_is_told(plan: Plan, tmp_path: Path) -> None:
    found = planned(plan, plan.trials, tmp_path, "jsd")
    assert (found.baseline, found.missing_baseline) == ("kd", "jsd")
    assert any(
        "baseline jsd has no finished trial; methods are compared with kd" in note for note in stages.reading_notes(found)
    )


def test_the_experiments_baseline_must_be_a_method(tmp_path: Path) -> None:
    assert stages.planned(tmp_path, "baseline=sft", methods=METHODS).comparison.baseline == "sft"
    with pytest.raises(ConfigError, match="baseline 'jsd' is no method; name one of kd, rkl, sft"):
        stages.planned(tmp_path, "baseline=jsd", methods=METHODS)
    assert Experiment.model_fields["baseline"].default is None


def test_prepared_rows_that_are_not_here_are_told(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "obtain", lambda place: None)
    limits = section(page(planned(plan, plan.trials, tmp_path)), "limits")
    assert "Whether prompts of general, tasks occur in the training or dev rows was not checked" in limits
    assert "how many were is not known here" in limits


def test_the_report_is_the_same_from_its_records_alone(plan: Plan, made: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    records = read_records(copy)
    again = tmp_path / "again"
    again.mkdir()
    written = records.facts.experiments[0].written
    write_report(again, records, plan.experiment.name, made.fingerprint, written)
    reports = [file for file in made.manifest.files if file not in FILES]
    assert len(reports) > 10
    assert [file for file in reports if (again / file).read_bytes() != (made.path / file).read_bytes()] == []


def test_only_one_training_seed_of_a_row_has_its_texts(made: Artifact) -> None:
    records = read_records(made.path)
    texts = {trial.name: [len(records.generations.answers(own)) for own in trial.evaluations] for trial in records.facts.trials}
    assert texts == {
        "teacher": [5, 3], "untrained": [5, 3], "kd s10": [5, 3], "kd s20": [0, 0], "rkl s10": [5, 3], "rkl s20": [0, 0],
        "sft s10": [5, 3], "sft s20": [0, 0],
    }  # fmt: skip
