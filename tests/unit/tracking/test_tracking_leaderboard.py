"""The preset view, the description and what the UI opens on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import experiment
import pytest

from pipeline.config import load_experiment
from pipeline.errors import ConfigError
from pipeline.leaderboard import FINISHED, VIEW_TAG, Links, address, description, opening, view_state

LINKS = Links("2", "1", "abc")
TABLE = "| method | general | avg |\n| --- | ---: | ---: |\n| kd | **1.00** | <u>1.00</u> |\n"


@dataclass
class Known:
    name: str
    experiment_id: str
    creation_time: int
    tags: dict[str, str] = field(default_factory=dict)


class Store:
    def __init__(self, *known: Known) -> None:
        self.known = known

    def search_experiments(self) -> list[Known]:
        return [Known("Default", "0", 99), *self.known]


def test_the_columns_that_matter_come_first() -> None:
    state = json.loads(view_state(["dolly", "vicuna"], ["scores"]))
    assert state["selectedColumns"] == [
        "params.`method`",
        "params.`student`",
        "params.`train_seed`",
        "metrics.`eval/avg/rouge_l`",
        "metrics.`eval/dolly/rouge_l`",
        "metrics.`eval/vicuna/rouge_l`",
        "metrics.`cost/tokens_per_second`",
        "metrics.`cost/peak_memory_gib`",
        "metrics.`cost/wall_seconds`",
    ]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`eval/avg/rouge_l`", False)
    assert set(state["selectedColumns"]) < set(state["columnOrder"]) == set(state["columnWidths"])


def test_the_view_fits_into_a_tag() -> None:
    assert (
        len(
            view_state(
                [f"benchmark{number}" for number in range(9)], ["scores", "curves", "cost", "lens", "confidence", "heat"]
            )
        )
        <= 5000
    )


def test_images_have_a_place_without_the_settings_of_their_runs() -> None:
    state = json.loads(view_state(["dolly"], ["scores", "lens"]))
    found = [chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE"]
    assert [chart["imageKeys"] for chart in found] == [["figures/scores"], ["figures/lens"]]
    assert not any(chart["showRunParams"] for chart in found)
    assert {chart["metricSectionId"] for chart in found} <= {section["uuid"] for section in state["compareRunSections"]}


def test_an_address_opens_in_the_mode_for_trained_models() -> None:
    assert address("http://127.0.0.1:5000/", "2", viewStateShareKey="leaderboard") == (
        "http://127.0.0.1:5000/#/experiments/2/runs?workflowType=machine_learning&viewStateShareKey=leaderboard"
    )


def test_the_description_begins_with_the_result(tmp_path: Path) -> None:
    settings = load_experiment(experiment.write(tmp_path, description="About it."))
    text = description(settings, "kd wins.", TABLE, ["How to read it."], LINKS)
    assert text.startswith("**kd wins.**\n\nAbout it.\n\n| method |")
    assert "| kd | **1.00** | 1.00 |" in text and text.endswith("- How to read it.")
    assert "[Report](#/experiments/1/runs/abc/artifacts/comparison/report.html?workflowType=machine_learning)" in text
    assert "[tasks](#/experiments/1/runs/abc/artifacts/comparison/generations_tasks.json?workflowType=machine_learning)" in text
    assert "(#/experiments/2/runs?workflowType=machine_learning&viewStateShareKey=leaderboard)" in text


def test_a_description_that_is_too_long_keeps_result_and_links(tmp_path: Path) -> None:
    settings = load_experiment(experiment.write(tmp_path))
    text = description(settings, "kd wins.", TABLE * 100, [], LINKS)
    assert len(text) <= 5000 and text.startswith("**kd wins.**\n\n[Report](")


def test_the_ui_opens_on_the_last_comparison() -> None:
    old = Known("old", "1", 5, {FINISHED: "200", VIEW_TAG: "{}"})
    older = Known("older", "2", 7, {FINISHED: "100", VIEW_TAG: "{}"})
    running = Known("running", "3", 9)
    assert opening(Store(older, old, running), None) == ("1", "old", True)
    assert opening(Store(older, old, running), "running") == ("3", "running", False)
    assert opening(Store(Known("first", "4", 1), running), None) == ("3", "running", False)


def test_an_unknown_experiment_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="'b' is not in this store; give one of those that are: a"):
        opening(Store(Known("a", "1", 1)), "b")
    with pytest.raises(ConfigError, match="no experiment yet"):
        opening(Store(), None)
