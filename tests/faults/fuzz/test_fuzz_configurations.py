"""Spoilt experiment, sweep and deployment files: one message and exit code 2, or a plan; nothing is ever written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import experiment
import pytest
import yaml
from fuzzing import change_text, examples, listing, places, refusal, run, spoilt, text_changes, values
from hypothesis import event, given
from hypothesis import strategies as st

from pipeline.config.loading import load_experiment, load_sweep
from pipeline.config.serve import load_serve
from pipeline.errors import ConfigError

pytestmark = pytest.mark.timeout(3000)
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHIPPED = {str(path.relative_to(CONFIGS)): path.read_text(encoding="utf-8") for path in sorted(CONFIGS.rglob("*.yaml"))}
SWEEP: dict[str, Any] = {
    "name": "s",
    "experiment": "experiment.yaml",
    "overrides": {"train.max_steps": 2},
    "axes": {
        "method": ["kd", "distilllens"],
        "train_seed": [10],
        "methods.distilllens.lens.weight": {"values": [0.5, 1], "when": {"method": "distilllens"}},
        "train.batch_size": {"low": 2, "high": 6, "integer": True},
    },
    "search": {"kind": "random", "points": 3},
    "baseline": "kd",
    "trial": {"retries": 0},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole experiment."""
    folder = tmp_path_factory.mktemp("fuzz")
    experiment.write(folder)
    return folder


@pytest.fixture(autouse=True)
def _here(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network in tests")

    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(room / "hub"))


def written(room: Path, content: Any, name: str) -> Path:
    path = room / name
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def checked(room: Path, *arguments: str) -> str:
    before = listing(room)
    outcome = run(*arguments)
    assert listing(room) == before and not outcome.touched, outcome
    event(f"exit code {outcome.code}")
    return refusal(outcome)


def tiny_experiment(room: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((room / "experiment.yaml").read_text(encoding="utf-8")))


@given(data=st.data())
@examples(2000)
def test_validate_plans_or_refuses_a_spoilt_experiment(room: Path, data: st.DataObject) -> None:
    content = data.draw(spoilt(tiny_experiment(room)))
    message = checked(room, "validate", str(written(room, content, "spoilt.yaml")))
    if message:
        assert any(
            sign in message for sign in ("spoilt.yaml", "data.", "teacher", "student", "methods", "benchmarks", ".jsonl")
        )


@given(data=st.data())
@examples(500)
def test_validate_plans_or_refuses_spoilt_text(room: Path, data: st.DataObject) -> None:
    text = change_text((room / "experiment.yaml").read_text(), data.draw(st.lists(text_changes(), min_size=1, max_size=3)))
    checked(room, "validate", str(written(room, text, "spoilt.yaml")))


@given(data=st.data())
@examples(500)
def test_validate_plans_or_refuses_overrides(room: Path, data: st.DataObject) -> None:
    known = [".".join(map(str, place)) for place in places(tiny_experiment(room))]
    name = data.draw(st.sampled_from(known) | st.text(min_size=1, max_size=12) | st.just("a." * 3000 + "b"))
    value = data.draw(values().map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip()) | st.text(max_size=12))
    text = f"{name}={value}".replace("\0", "")
    message = checked(room, "validate", "experiment.yaml", "--set", text)
    assert len(message) < 5000


@given(data=st.data())
@examples(500)
def test_sweeps_are_planned_or_refused(room: Path, data: st.DataObject) -> None:
    """Of few points: each is planned as an experiment, and how many there may be has its own test."""
    checked(room, "sweep", str(written(room, data.draw(spoilt(SWEEP)), "spoilt-sweep.yaml")), "--dry-run")


@pytest.mark.parametrize("name", SHIPPED)
@given(data=st.data())
@examples(100)
def test_shipped_files_load_or_are_refused(room: Path, name: str, data: st.DataObject) -> None:
    folder = room / "shipped" / Path(name).parent
    folder.mkdir(parents=True, exist_ok=True)
    for other, text in SHIPPED.items():  # what they include
        target = room / "shipped" / other
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    if data.draw(st.booleans()):
        changed: Any = data.draw(spoilt(yaml.safe_load(SHIPPED[name])))
    else:
        changed = change_text(SHIPPED[name], data.draw(st.lists(text_changes(), min_size=1, max_size=2)))
    path = written(folder, changed, "spoilt.yaml")
    load = (
        load_sweep
        if name.startswith("sweeps")
        else (lambda p: load_serve(p, room))
        if name == "serve.yaml"
        else load_experiment
    )
    try:
        load(path)
    except ConfigError as error:
        assert error.problems and all(problem.strip() and problem.isprintable() for problem in error.problems)
        assert "spoilt.yaml" in str(error) or "shipped" in str(error)
