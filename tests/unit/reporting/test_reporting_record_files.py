"""Records on disk: what is written is read again, and what a stranger may send is refused with one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from records import changed, records

from pipeline.artifacts import MANIFEST, commit
from pipeline.errors import ArtifactError
from pipeline.evaluation.lens_profile import LensHeat
from pipeline.reporting import record_files
from pipeline.reporting.record import Records
from pipeline.reporting.record_files import FACTS, FILES, GENERATIONS, PROMPTS, read_facts, read_records, write_records

OWN = records("a", {"teacher": [None], "kd": [10, 20]}, {"general": None, "tasks": None}, metrics={"judge": "m"})


def sealed(folder: Path, edit: Callable[[Path], None] = lambda folder: None, stage: str = "compare") -> Path:
    """A comparison with the records, changed before its checksums were taken."""
    partial, final = folder / "partial", folder / "comparison"
    partial.mkdir()
    write_records(partial, OWN)
    edit(partial)
    commit(partial, final, stage=stage, fingerprint="f" * 16, recipe={}, upstream={}, counts={}, seconds=0.0)
    return final


def with_facts(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        change(content)
        (folder / FACTS).write_text(json.dumps(content), encoding="utf-8")

    return edit


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        read_records(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = read_records(sealed(tmp_path))
    assert found.facts == OWN.facts == read_facts(tmp_path / "comparison")
    assert found.generations.prompts == OWN.generations.prompts
    assert {name: table.to_pylist() for name, table in found.generations.tables.items()} == {
        name: table.to_pylist() for name, table in OWN.generations.tables.items()
    }


def test_models_that_were_not_trained_need_no_data(tmp_path: Path) -> None:
    own = records("a", {"teacher": [None]})
    assert read_records(sealed(tmp_path, lambda partial: write_records(partial, own))).facts == own.facts


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = sealed(tmp_path)
    with (folder / name).open("ab") as stream:
        stream.write(b" ")
    assert f"the checksum of {name} differs" in refused(folder)
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "no finished comparison" in refused(tmp_path)
    folder = sealed(tmp_path, stage="train")
    assert "holds a train artifact, not a comparison" in refused(folder)
    (folder / MANIFEST).write_text("{}", encoding="utf-8")
    assert "no finished comparison" in refused(folder)


def test_a_comparison_of_an_older_version_says_what_to_do(tmp_path: Path) -> None:
    folder = sealed(tmp_path, lambda partial: [(partial / name).unlink() for name in FILES] and None)
    text = refused(folder)
    assert "older version" in text and "run `distilllens reproduce` again" in text


def seen_through(heat: LensHeat) -> Records:
    """The records with a heat map of the first trial."""
    first, *others = OWN.facts.trials
    return changed(OWN, trials=[replace(first, heat=heat), *others])


HEAT = LensHeat(("␣a", "↵"), ((1, 2), (3, 6)), ((0.1, 0.2), (0.3, 0.69)))


def with_heat(**changes: Any) -> Callable[[Any], Any]:
    return lambda facts: facts["trials"][0].update(heat={**asdict(HEAT), **changes})


def test_a_heat_map_is_read_again(tmp_path: Path) -> None:
    own = seen_through(HEAT)
    assert read_facts(sealed(tmp_path, lambda partial: write_records(partial, own))) == own.facts


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "key": (lambda facts: facts.update(more=1), "more: Unexpected keyword argument"),
    "type": (lambda facts: facts["trials"][0].update(row=5), "trials.0.row: "),
    "control": (lambda facts: facts["trials"][0].update(row="\x1b[2J"), "characters that cannot be shown"),
    "direction": (lambda facts: facts["experiments"][0].update(label="\u202ea"), "characters that cannot be shown"),
    "path": (lambda facts: facts["experiments"][0].update(name="../a"), "experiments.0.name: "),
    "nothing": (lambda facts: facts.update(trials=[]), "no experiments or no trials"),
    "twice": (lambda facts: facts["trials"].append(facts["trials"][0]), "two trials or experiments of one name"),
    "baseline": (lambda facts: facts.update(baseline="jsd"), "no row 'jsd'"),
    "origin": (lambda facts: facts["trials"][0].update(origins=["0"]), "'teacher' is of no experiment"),
    "evaluation": (lambda facts: facts["trials"][0].update(evaluations=[]), "'teacher' has no evaluation"),
    "scores": (
        lambda facts: facts["trials"][0]["evaluations"][0].update(measured=None),
        "'teacher' on 'general' has no scores",
    ),
    "data": (lambda facts: facts.update(data=[]), "nothing is known of the training data of 'kd s10'"),
    "inputs": (lambda facts: facts["trials"][1]["training"].update(inputs=[]), "'kd s10' has no training data"),
    "seed": (lambda facts: facts["trials"][1].update(seed=None), "is said to be trained and not trained"),
    "protocol": (lambda facts: facts["trials"][0]["evaluations"][0]["protocol"].pop("decoding"), "has no protocol"),
    "infinite": (lambda facts: facts["trials"][0]["evaluations"][0]["protocol"].update(x=float("inf")), "has no protocol"),
    "setting": (lambda facts: facts["trials"][1]["training"]["settings"].update(x=float("nan")), "the settings of 'kd s10'"),
    "large": (lambda facts: facts["trials"][1].update(seed=2**70), "trials.1.seed: "),
    "not a number": (
        lambda facts: facts["trials"][0]["evaluations"][0]["measured"].update(share_cut=float("nan")),
        "share_cut: ",
    ),
    "no divergence": (with_heat(jsd=[[0.1, 0.2], [0.3, 0.8]]), "trials.0.heat: Value error, a divergence is not 0 to log 2"),
    "infinite divergence": (with_heat(jsd=[[0.1, 0.2], [0.3, float("inf")]]), "trials.0.heat.jsd.1.1: "),
    "missing divergence": (with_heat(jsd=[[0.1, 0.2], [0.3]]), "not one divergence for each pair of layers and each token"),
    "text divergence": (with_heat(jsd=[[0.1, 0.2], [0.3, "a"]]), "trials.0.heat.jsd.1.1: "),
    "control token": (with_heat(tokens=["a", "\x1b[2J"]), "trials.0.heat: Value error, has characters that cannot be shown"),
    "long token": (with_heat(tokens=["a", "b" * 201]), "200 characters in a token"),
    "many tokens": (with_heat(tokens=["a"] * 65, jsd=[[0.1] * 65] * 2), "more than 256 layers, 64 tokens"),
    "many layers": (with_heat(pairs=[[1, 2]] * 257, jsd=[[0.1] * 2] * 257), "more than 256 layers, 64 tokens"),
    "layer": (with_heat(pairs=[[1, 2], [3, -6]]), "has a layer that no model has"),
    "generations": (lambda facts: facts["trials"][0]["evaluations"][0].update(fingerprint="0"), "no generations of 'teacher'"),
    "prompts": (lambda facts: facts["trials"][0]["evaluations"][0].update(prompts="0"), "without their prompts"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_facts_that_do_not_hold_together_are_refused(tmp_path: Path, change: str) -> None:
    edit, message = CHANGES[change]
    text = refused(sealed(tmp_path, with_facts(edit)))
    assert "its records are damaged" in text and message in text


def test_facts_that_are_no_json_or_too_deep_are_refused(tmp_path: Path) -> None:
    for at, content in enumerate(("{", "[" * 100_000, "\udcff")):
        (tmp_path / str(at)).mkdir()
        raw = content.encode("utf-8", "surrogateescape")
        assert FACTS in refused(sealed(tmp_path / str(at), lambda folder, raw=raw: (folder / FACTS).write_bytes(raw) and None))


def tables(folder: Path) -> pa.Table:
    return parquet.read_table(folder / GENERATIONS)


def test_tables_of_other_shape_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[Path], Any], str]] = [
        (lambda folder: parquet.write_table(tables(folder).drop_columns(["seed"]), folder / GENERATIONS), "other columns"),
        (
            lambda folder: parquet.write_table(
                tables(folder).set_column(1, "id", pa.nulls(len(tables(folder)), pa.string())), folder / GENERATIONS
            ),
            "rows without id",
        ),
        (
            lambda folder: parquet.write_table(
                tables(folder).set_column(3, "rouge_l", pa.array([float("nan")] * len(tables(folder)))), folder / GENERATIONS
            ),
            "rouge_l is not 0 to 100",
        ),
        (lambda folder: (folder / PROMPTS).write_bytes(b"PAR1"), "prompts.parquet: "),
    ]
    for at, (edit, message) in enumerate(cases):
        (tmp_path / str(at)).mkdir()
        assert message in refused(sealed(tmp_path / str(at), edit))


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sealed(tmp_path)
    monkeypatch.setitem(record_files.MAX_FILE_BYTES, PROMPTS, 10)
    assert "prompts.parquet has more than 10 bytes" in refused(folder)
    monkeypatch.setitem(record_files.MAX_FILE_BYTES, PROMPTS, 10**6)
    monkeypatch.setattr(record_files, "MAX_TABLE_BYTES", 10)
    assert "or 10 bytes" in refused(folder)
    monkeypatch.setattr(record_files, "MAX_TABLE_BYTES", 10**6)
    monkeypatch.setattr(record_files, "MAX_ROWS", 3)
    assert "more than 3 rows" in refused(folder)


def test_it_can_be_moved(tmp_path: Path) -> None:
    there = shutil.move(sealed(tmp_path), tmp_path / "elsewhere")
    assert read_records(Path(there)).facts == OWN.facts
