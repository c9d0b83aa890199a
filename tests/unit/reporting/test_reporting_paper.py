"""The ledger of configs/paper: complete, sourced, equal to the files wherever it names no deviation; the published scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Experiment, load_experiment
from pipeline.config.loading import read_yaml
from pipeline.reporting import paper
from pipeline.reporting.paper import CONFIGS, EVERY, LEDGER, SCORES, Setting, load_configs, markdown, ours

PROJECT = Path(__file__).resolve().parents[3]
FOLDER = PROJECT / "configs" / "paper"
TABLE_1 = {"sft", "kd", "seqkd", "rkl", "fkl_rkl", "jsd", "akl", "distilllens"}
# What a file is called, which of several things a mapping is, and how the same mathematics is carried out and stored.
NO_SETTING = {"name", "description", "fair", "kind", "revision", "elementwise", "checkpoint_every", "save_merged"}
# The means that the notebook prints beside the five scores, dolly, self_inst, vicuna, s_ni and unni in turn.
PRINTED_MEANS = {
    "distilllens": (26.8212, 21.6834, 20.5562, 42.6527, 38.6488),
    "kd": (24.5228, 20.6505, 17.7894, 38.5388, 32.9025),
    "rkl": (25.9917, 20.9824, 19.5057, 40.1351, 35.5423),
    "fkl_rkl": (25.8109, 21.2038, 18.9443, 40.0174, 35.1976),
    "akl": (24.9863, 20.3732, 19.6003, 38.7626, 34.5614),
    "jsd": (24.1070, 18.6738, 18.0456, 37.0141, 32.6159),
    "sft": (24.4178, 19.2379, 18.0093, 38.0975, 33.2279),
}
BY_NAME = [pytest.param(setting, id=f"{setting.config}:{setting.path}") for setting in LEDGER]


@pytest.fixture(scope="module")
def experiments() -> dict[str, Experiment]:
    return load_configs(FOLDER)


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Dotted path of every value that is given; a list is one value, and a method without settings gives none."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else key)
    elif not (value is None and path.count(".") == 1 and path.startswith("methods.")):
        yield path


def own_leaves(config: str, folder: Path) -> set[str]:
    """Paths that the file itself gives, without what it includes."""
    text = (FOLDER / f"{config}.yaml").read_text(encoding="utf-8")
    alone = folder / "alone.yaml"
    alone.write_text("\n".join(line for line in text.splitlines() if not line.startswith("include:")), encoding="utf-8")
    return {path for path in leaves(read_yaml(alone)) if path.rpartition(".")[2] not in NO_SETTING}


def test_every_file_of_the_folder_is_in_the_ledger() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(CONFIGS)
    assert {setting.config for setting in LEDGER} == {*CONFIGS, EVERY}


def test_the_document_is_the_ledger_rendered(experiments: dict[str, Experiment]) -> None:
    found = (PROJECT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert found == markdown(experiments), "write it anew: python -m pipeline.reporting.paper docs/paper.md"


def test_no_setting_is_there_twice() -> None:
    seen = [(config, s.path) for s in LEDGER for config in (CONFIGS if s.config == EVERY else (s.config,))]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("setting", BY_NAME)
def test_a_setting_has_a_source_and_without_deviation_the_same_value(
    setting: Setting, experiments: dict[str, Experiment]
) -> None:
    assert setting.source.strip()
    mine = ours(setting, experiments)
    if not setting.deviation:
        assert mine == setting.theirs
    cells = (setting.path, setting.theirs, mine, setting.source, setting.deviation)
    assert not any("|" in str(cell) or "\n" in str(cell) for cell in cells)


@pytest.mark.parametrize("config", CONFIGS)
def test_everything_that_a_file_sets_is_in_the_ledger(config: str, tmp_path: Path) -> None:
    known = {setting.path for setting in LEDGER if setting.config in (config, EVERY)}
    given = own_leaves(config, tmp_path)
    assert given - known == set()
    assert len(given) > 30


@pytest.mark.parametrize("config", CONFIGS)
def test_every_row_of_table_1_is_there_and_its_budget_is_accounted_for(config: str, experiments: dict[str, Experiment]) -> None:
    experiment = experiments[config]
    extra = {"mse"} if config.startswith("gpt2") else set()
    assert set(experiment.methods) == TABLE_1 | extra
    assert not experiment.fair
    known = {setting.path for setting in LEDGER if setting.config in (config, EVERY)}
    for method in experiment.methods.values():
        budget = {} if method.train is None else method.train.model_dump(exclude_none=True)
        assert {f"methods.{method.kind}.train.{name}" for name in budget} <= known
    # Methods without a script of their own, and without the kd script that the others share, say so.
    for name in ("sft", "seqkd"):
        assert any(path.startswith(f"methods.{name}.train") for path in known)


def test_one_value_for_several_keys_must_be_the_same_for_all(experiments: dict[str, Experiment]) -> None:
    seeds = Setting(EVERY, "benchmarks.*.seeds", None, "")
    assert ours(seeds, experiments) == [10, 20, 30, 40, 50]
    with pytest.raises(ValueError, match="benchmarks.*.source.repo stands for"):
        ours(replace(seeds, config="gpt2-120m", path="benchmarks.*.source.repo"), experiments)
    with pytest.raises(ValueError, match="train.epochs stands for"):
        ours(replace(seeds, path="train.epochs"), experiments)
    with pytest.raises(KeyError, match="nothing"):
        ours(replace(seeds, path="train.nothing"), experiments)


def test_ours_is_read_from_the_files(experiments: dict[str, Experiment]) -> None:
    changed = load_experiment(FOLDER / "gpt2-340m.yaml", ["methods.distilllens.train.learning_rate=0.375"])
    text = markdown({**experiments, "gpt2-340m": changed})
    row = "| `methods.distilllens.train.learning_rate` | 5e-05 | {} | gpt2/distill_lens/train_medium.sh: LR |  |"
    assert row.format("5e-05") in markdown(experiments) and row.format("0.375") in text


@pytest.mark.parametrize("method", PRINTED_MEANS)
def test_the_published_scores_have_the_printed_means(method: str, experiments: dict[str, Experiment]) -> None:
    found = [score for score in SCORES if score.method == method]
    assert [score.benchmark for score in found] == list(experiments["qwen2.5-1.5b"].benchmarks)
    # The notebook prints the five scores to three places.
    assert [score.mean for score in found] == pytest.approx(PRINTED_MEANS[method], abs=6e-4)


def test_every_published_score_is_a_row_of_ours_with_a_source_and_in_the_document(experiments: dict[str, Experiment]) -> None:
    text = markdown(experiments)
    assert len(SCORES) == 35 == len({(score.student, score.method, score.benchmark) for score in SCORES})
    for score in SCORES:
        assert score.source.strip() and score.method in TABLE_1
        assert f"| {score.mean:.2f} ± {score.std:.2f} |" in text
    assert "| sft | 24.42 ± 0.29 | 19.24 ± 0.94 | 18.01 ± 0.28 | 38.10 ± 0.34 | 33.23 ± 0.05 |" in text


def test_the_module_prints_or_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    paper.main([])
    paper.main([str(tmp_path / "paper.md")])
    assert capsys.readouterr().out == (tmp_path / "paper.md").read_text(encoding="utf-8")
    assert (tmp_path / "paper.md").read_text(encoding="utf-8").startswith("# The paper's settings")
