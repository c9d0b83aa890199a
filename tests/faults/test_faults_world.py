"""An unusual world: names and texts of any script, another locale, a clock that jumps."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faults_run
import pyarrow.parquet as parquet
import pytest
import tiny
from faults_results import differences, results
from faults_run import CONTEXT
from faults_setup import ALL, Tally, Undisturbed

from pipeline.data.tokenize import read_encoded, read_prompts
from pipeline.errors import DataError
from pipeline.plan import check_inputs
from pipeline.stages import place, prepare
from pipeline.stages.prepare import DEV_PROMPTS, TRAIN

ROOT = Path(__file__).resolve().parents[2]
ODD = "größe 東京 🙂 שלום (1) [a] {b} $HOME & 'co' # %41"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Python with file names and standard output in ASCII, as on systems whose locale is not UTF-8."""
TEXTS = {
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🙂",
    "right to left": "שלום، مرحبا",
    "combining": "e\u0301 u\u0308 Z\u0337\u0321a\u0334",
    "composed": "é ü",
    "NUL": "a\0b",
    "controls": "\x1b[31mred\x07",
    "override": "\u202eabc\u202c",
    "separators": "a\u2028b\u2029c\x85d\x0be",
    "markup": "<script>alert(1)</script> & &amp; {{ x }} {0} %s",
    "white space": " \t a\r\nb  ",
}
LONG = "word " * 2_000


# Names


def test_paths_of_any_script(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / ODD
    ended = faults_run.run(folder / "experiment", folder / "runs", tmp_path / "scratch")
    what = ended.log if ended.code else differences(undisturbed.results, results(folder / "runs"))
    tally("paths of any script", not what, what)


# Locale


def command(environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command line."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PREFECT_", "MLFLOW_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], cwd=ROOT, env={**given, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return ended.returncode, ended.stdout.decode(errors="replace")


def test_a_locale_of_another_encoding(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / ODD
    faults_run.planned(folder, folder / "runs")
    code, said = command(ASCII, "validate", str(folder / "experiment.yaml"), "--run-dir", str(folder / "runs"))
    tally("locale", code == 0 and "prepare training rows" in said, said)
    if not ALL:
        return
    missing = f"data.train.path={json.dumps(str(folder / 'fehlt-ü.jsonl'), ensure_ascii=False)}"
    code, said = command(ASCII, "validate", str(folder / "experiment.yaml"), "--set", missing)
    tally("locale", code == 2 and "fehlt-ü.jsonl: no such file" in said and "Traceback" not in said, said)


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Locales that a machine may lack: in Turkish i and I are no pair, in German 1.5 is written 1,5."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make locales with")
    for name, encoding in (("tr_TR", "UTF-8"), ("de_DE", "ISO-8859-15")):
        made = subprocess.run(["localedef", "-i", name, "-f", encoding, str(folder / f"{name}.{encoding}")], check=False)
        if made.returncode > 1:  # 1 is a warning
            pytest.skip(f"localedef has no {name}")
    return folder


@pytest.mark.skipif(not ALL, reason="runs the whole program; `make faults`")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["C", "tr_TR.UTF-8", "de_DE.ISO-8859-15"])
def test_the_locale_changes_no_result(name: str, locales: Path, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / ODD
    faults_run.planned(folder, folder / "runs")
    given = {**ASCII, "LC_ALL": name, "LOCPATH": str(locales)}
    code, said = command(given, "reproduce", str(folder / "experiment.yaml"), "--run-dir", str(folder / "runs"))
    table = Path("tiny", "comparison", "results.csv")
    same = code == 0 and (folder / "runs" / table).read_bytes() == (undisturbed.run_dir / table).read_bytes()
    tally("locale", same, said)


# Clock


def _child(folder: Path, run_dir: Path, told: Path) -> None:
    """Run everything; before each piece of work the clock jumps, and the time zone changes."""
    real, day, year = time.time, 86_400.0, 365 * 86_400.0
    jumps = itertools.cycle([(-day, "Asia/Tokyo"), (year, "America/New_York"), (0.0, "UTC"), (-20 * year, "Asia/Kathmandu")])
    offset, make, count = 0.0, place._make, 0

    def jumping(*given: Any) -> Any:
        nonlocal offset, count
        offset, os.environ["TZ"] = next(jumps)
        time.tzset()
        count += 1
        return make(*given)

    time.time = lambda: real() + offset
    place._make = jumping
    faults_run._count_work(Path(os.devnull))
    faults_run.run_all(faults_run.planned(folder, run_dir))
    told.write_text(str(count))


def test_a_clock_that_jumps(undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    run_dir, told = tmp_path / "runs", tmp_path / "told"
    for again in (False, True):  # the second time everything is from the past or the future, and all the same reused
        process = CONTEXT.Process(target=_child, args=(undisturbed.folder, run_dir, told))
        process.start()
        process.join()
        assert process.exitcode == 0
        what = differences(undisturbed.results, results(run_dir))
        made = int(told.read_text())
        tally("clock that jumps", not what and (made == 0) == again, what or f"{made} made")
    manifests = [json.loads(file.read_text()) for file in run_dir.rglob("manifest.json")]
    created = [manifest["created"] for manifest in manifests]
    assert max(created) - min(created) > 20 * 365 * 86_400  # it did jump
    records = [json.loads(line) for file in run_dir.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    speeds = [record["metrics"].get("train/tokens_per_second", 1.0) for record in records]
    negative = [manifest["stage"] for manifest in manifests if manifest["seconds"] < 0]
    tally("clock that jumps", not negative and min(speeds) > 0, f"negative: {negative}, {min(speeds)}")


# Texts


def rows() -> list[dict[str, Any]]:
    """Texts of every kind in each column, empty and blank outputs, duplicates."""
    found = tiny.rows(12)
    for index, (name, text) in enumerate(TEXTS.items()):
        found.append({"instruction": f"{name}: {text}", "input": text if index % 2 else "", "output": text})
    found += [{"instruction": "empty", "output": ""}, {"instruction": "blank", "output": " \t\n\u3000"}]
    found += [{"instruction": LONG, "output": "a"}, {"instruction": "sum up", "input": LONG, "output": "a"}]
    return [*found, found[0], found[14], found[0]]


def write(folder: Path, before: bytes, line_end: str, ids: bool) -> None:
    """The experiment, with these rows in all of its files."""
    faults_run.planned(folder, folder)
    numbered = [{"id": index % 3 if index % 2 else "same", **row} if ids else row for index, row in enumerate(rows())]
    text = "".join(json.dumps(row, ensure_ascii=False) + line_end for row in numbered)
    for name in ("train", "dev", "general", "tasks"):
        (folder / f"{name}.jsonl").write_bytes(before + text.encode())


def test_texts_of_any_kind(tmp_path: Path, tally: Tally) -> None:
    folder, run_dir = tmp_path / "experiment", tmp_path / "runs"
    write(folder, b"\xef\xbb\xbf", "\r\n", ids=True)
    ended = faults_run.run(folder, run_dir, tmp_path / "scratch")
    tally("texts of any kind", ended.code == 0, ended.log)
    plan = faults_run.planned(folder, run_dir)
    given, data = rows(), plan.data.place.open()
    counts = data.manifest.counts["train"]
    assert (counts["rows"], counts["empty_response"], counts["overlong_prompt"]) == (len(given), 2, 2)
    comparison = run_dir / "tiny" / "comparison"
    kept = [row for row in given if LONG not in row.values()]
    references = parquet.read_table(comparison / "prompts.parquet")["references"].to_pylist()
    same = sorted(text for texts in references for text in texts) == sorted(row["output"] for row in kept)
    tally("texts of any kind", same, "references in the comparison are not those of the rows")
    report = (comparison / "report.html").read_bytes().decode()
    shown = 'charset="utf-8"' in report.lower() and "<script>alert(1)" not in report
    tally("texts of any kind", shown and "general" in (comparison / "results.csv").read_text("utf-8"), "report or table")


def test_byte_order_mark_line_ends_and_ids_change_no_row(tmp_path: Path, tally: Tally) -> None:
    files = []
    for name, layout in {"plain": (b"", "\n", False), "other": (b"\xef\xbb\xbf", "\r\n", True)}.items():
        write(tmp_path / name, *layout)
        files.append(prepare.run(faults_run.planned(tmp_path / name, tmp_path / name / "runs").data))
    plain, other = ({name: facts["sha256"] for name, facts in artifact.manifest.files.items()} for artifact in files)
    tally("texts of any kind", plain == other, f"{plain}\n{other}")
    found = read_encoded(files[0].path / TRAIN)
    assert len(set(found.ids)) == len(found) and {name[17:] for name in found.ids} == {"", "2", "3"}
    assert {prompt.references[0] for prompt in read_prompts(files[0].path / DEV_PROMPTS)} >= set(TEXTS.values())


def test_a_prompt_of_ten_thousand_characters_is_cut_where_that_is_allowed(tmp_path: Path, tally: Tally) -> None:
    write(tmp_path, b"", "\n", ids=False)
    plan = faults_run.stages.planned(tmp_path, "data.overlong=truncate_context", **faults_run.CHANGES)
    counts = prepare.run(plan.data).manifest.counts["train"]
    cut = (counts["truncated_context"], counts["overlong_prompt"])  # an instruction is never cut
    tally("texts of any kind", cut == (1, 1), str(counts))


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_half_a_surrogate_pair_is_named_with_its_row(column: str, tmp_path: Path, tally: Tally) -> None:
    plan = faults_run.planned(tmp_path, tmp_path / "runs")
    row = {"instruction": "a", "input": "b", "output": "c", column: "half \ud800 a pair"}
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(DataError) as raised:
        check_inputs(plan)
    said = str(raised.value)
    named = f"train.jsonl:25: {column} holds half a surrogate pair at character 5" in said and "remove it" in said
    tally("texts of any kind", named and not (tmp_path / "runs").exists(), said)
