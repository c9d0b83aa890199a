"""`train.learning_rate` as a list: one budget for every candidate, and validation keeps the best."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from safetensors.torch import load_file

from pipeline.errors import TrainingError
from pipeline.stages import fit, train
from pipeline.stages.fit import METRICS, MODEL, SUMMARY
from pipeline.training.stopping import Stopped

SETTINGS = ("validation.select=loss", "train.seeds=[10]")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["metrics"]["train/loss"] for record in metrics(folder) if "train/loss" in record["metrics"]]


def run(folder: Path, rate: str, *overrides: str, run_dir: Path | None = None) -> Any:
    plan = stages.planned(folder, *SETTINGS, f"train.learning_rate={rate}", *overrides, methods={"kd": None}, run_dir=run_dir)
    return train.run(stages.training(stages.run_inputs(plan), "kd"))


def test_the_best_candidate_is_the_run_with_that_rate_alone(tmp_path: Path) -> None:
    searched = run(tmp_path, "[1e-6, 5e-3, 1e-5]")
    counts = searched.manifest.counts
    assert counts["learning_rate"] == 5e-3 and counts["search"].keys() == {"1e-06", "0.005", "1e-05"}
    assert counts["best_value"] == counts["search"]["0.005"] == min(counts["search"].values())
    alone = run(tmp_path, "5e-3")
    assert losses(searched.path) == losses(alone.path) and len(losses(alone.path)) == 4
    ours, theirs = (load_file(artifact.path / MODEL / "model.safetensors") for artifact in (searched, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert alone.manifest.counts["best_value"] == counts["best_value"] and "search" not in alone.manifest.counts


def test_every_candidate_is_recorded_with_the_same_budget(tmp_path: Path) -> None:
    artifact = run(tmp_path, "[1e-6, 5e-3]")
    assert metrics(artifact.path)[-1]["metrics"].keys() == {"search/1e-06", "search/0.005"}
    for index in (0, 1):
        folder = artifact.path / "candidates" / str(index)
        assert len(losses(folder)) == 4 and json.loads((folder / SUMMARY).read_text())["steps"] == 4
        assert not (folder / MODEL).exists()  # only the best one's weights are kept
    assert json.loads((artifact.path / SUMMARY).read_text())["learning_rate"] == 5e-3


def test_the_comparison_tells_what_the_search_kept(tmp_path: Path) -> None:
    run(tmp_path, "[1e-6, 5e-3]")
    plan = stages.planned(tmp_path, *SETTINGS, "train.learning_rate=[1e-6, 5e-3]", methods={"kd": None, "sft": None})
    settings = stages.method_settings(plan.trials)
    assert settings["kd"]["train.learning_rate kept by the search"] == "0.005"
    assert "train.learning_rate kept by the search" not in settings["sft"]  # not trained yet


def test_a_list_of_one_is_that_rate(tmp_path: Path) -> None:
    def fingerprint(rate: str) -> str:
        plan = stages.planned(tmp_path, *SETTINGS, f"train.learning_rate={rate}", methods={"kd": None})
        return stages.training(plan, "kd").place.fingerprint

    assert fingerprint("[0.001]") == fingerprint("0.001") != fingerprint("[0.001, 0.002]")


def test_finished_candidates_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[float] = []
    fit_one = fit._fit_one

    def counting(job: Any, rate: float, *rest: Any) -> Any:
        trained.append(rate)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit_one(job, rate, *rest)

    monkeypatch.setattr(fit, "_fit_one", counting)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "[1e-6, 5e-3]")
    artifact = run(tmp_path, "[1e-6, 5e-3]")
    assert trained == [1e-6, 5e-3, 5e-3] and artifact.manifest.counts["learning_rate"] == 5e-3


def test_a_rate_at_which_training_breaks_down_loses(tmp_path: Path) -> None:
    counts = run(tmp_path, "[1e30, 1e-3]").manifest.counts
    assert counts["learning_rate"] == 1e-3 and counts["search"]["1e+30"] is None


def test_when_every_rate_breaks_down_the_first_failure_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="train kd s10: training failed at every learning rate; the first: step 2"):
        run(tmp_path, "[1e30, 1e31]")


def test_a_signal_after_the_last_step_ends_the_command_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit._fit_here

    def signalled(*given: Any) -> Any:
        counts = real(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return counts

    monkeypatch.setattr(fit, "_fit_here", signalled)
    with pytest.raises(Stopped, match="kd s10: stopped after its last step; run the same command again to go on") as stopped:
        run(tmp_path, "5e-3")
    assert stopped.value.exit_code == 143
    monkeypatch.setattr(fit, "_fit_here", None)  # nothing is trained again
    assert run(tmp_path, "5e-3").manifest.counts["steps"] == 4
