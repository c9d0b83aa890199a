"""Heat maps of the logit lens on their way from records to the report and to the images of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from records import changed, records

from pipeline.evaluation.lens_profile import LayerProfile, LensHeat
from pipeline.gallery import FIGURES, run_images
from pipeline.reporting import lens_figure, report
from pipeline.reporting.merge import merge
from pipeline.reporting.record import Records
from pipeline.reporting.report import write_report

BASE = {"teacher": [None], "untrained": [None], "kd": [10, 20]}


def heat(value: float) -> LensHeat:
    return LensHeat(("␣a", "$x"), ((1, 2), (3, 6)), ((value, 0.1), (0.2, 0.3)))


HEATS = {"untrained": heat(0.6), "kd s10": heat(0.1), "kd s20": heat(0.2)}


def seen(own: Records, heats: Mapping[str, LensHeat]) -> Records:
    return changed(own, trials=[replace(trial, heat=heats.get(trial.name)) for trial in own.facts.trials])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, LensHeat]]:
    """What every figure of heat maps shows."""
    shown: list[Mapping[str, LensHeat]] = []
    draw = lens_figure.heat_figure
    monkeypatch.setattr(lens_figure, "heat_figure", lambda heats: [shown.append(heats), draw(heats)][1])
    return shown


def caption(own: Records, folder: Path) -> str:
    """The report's words below the heat maps, "" where there is none."""
    write_report(folder, own, "a", "0" * 16, {"report written on": "here"})
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r"<strong>Divergence to the teacher, token by token\.</strong>(.*?)</figcaption>", page, re.DOTALL)
    assert (folder / "figures" / "lens_heat.svg").exists() == (found is not None)
    return found[1] if found else ""


def test_the_report_shows_the_first_training_seed_of_each_method(tmp_path: Path, drawn: list[Mapping[str, LensHeat]]) -> None:
    own = seen(records("a", BASE), HEATS)
    layers = [LayerProfile(1, 2, False, 9, 0.2, 0.1, 0.1, 1, 1, 0.3, 0.3, 0.5)]
    profiled = [trial if trial.heat is None else replace(trial, profile=layers) for trial in own.facts.trials]
    assert "on the same dev row" in caption(changed(own, trials=profiled), tmp_path)
    assert drawn == [{"untrained": HEATS["untrained"], "kd s10": HEATS["kd s10"]}]


def test_a_report_without_heat_maps_has_no_figure_of_them(tmp_path: Path) -> None:
    assert caption(records("a", BASE), tmp_path) == ""


def test_rows_beyond_what_fits_are_told(tmp_path: Path, drawn: list[Mapping[str, LensHeat]]) -> None:
    own = records("a", {f"m{at}": [1] for at in range(26)})
    heats = {trial.name: heat(0.1) for trial in own.facts.trials}
    (tmp_path / "figures").mkdir()
    (picture,) = report._heat_figures(seen(own, heats).facts, tmp_path, "")
    assert "first 24 of 26 rows" in picture.caption and list(drawn[0]) == [f"m{at} s1" for at in range(24)]


def test_one_that_either_experiment_has_is_there_when_they_are_together() -> None:
    found = merge([records("a", BASE), seen(records("b", BASE), HEATS)])
    assert {trial.name: trial.heat for trial in found.facts.trials if trial.heat is not None} == HEATS


def test_every_run_that_has_one_has_its_image() -> None:
    images = {trial.name: found for trial, found in run_images(seen(records("a", BASE), HEATS))}
    assert {name for name, found in images.items() if "heat" in found} == HEATS.keys()
    assert images["kd s10"]["heat"][:4] == b"\x89PNG" and images["kd s10"]["heat"] != images["kd s20"]["heat"]
    assert set().union(*images.values()) <= set(FIGURES)
