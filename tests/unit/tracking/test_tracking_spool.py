"""What was told stays on disk: whole records in order, whatever ends the process."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking.spool import Progress, Series, spool_of, spools

TELLER = """
import sys
from pathlib import Path
from pipeline.tracking.spool import spool_of
spool, number = spool_of(Path(sys.argv[1]), "key"), int(sys.argv[2])
while True:
    spool.append({"op": "metrics", "key": "key", "time": number, "metrics": {"a" * (number % 9 * 2000): number}})
    print(number, flush=True)
    number += 1
"""


def record(number: int) -> dict[str, object]:
    return {"op": "metrics", "key": "key", "time": number, "metrics": {"a": number}}


@pytest.mark.parametrize("moment", range(2))
def test_sigkill_at_a_seeded_moment_loses_nothing_that_was_told(moment: int, tmp_path: Path) -> None:
    told = 0
    for attempt in range(2):  # the second goes on behind what the first left, also a torn line
        process = subprocess.Popen(
            [sys.executable, "-c", TELLER, str(tmp_path), str(told)], stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(random.Random(f"{moment} {attempt}").randrange(1, 300)):
            told = int(process.stdout.readline()) + 1
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")[:-1]
        told = max([told, *(int(number) + 1 for number in rest)])
        process.wait()
        found = [record["time"] for record, _ in spool_of(tmp_path, "key").records()]
        # At most the record that was being written is there beyond what `append` came back from.
        assert found in (list(range(told)), list(range(told + 1)))
        told = len(found)


def test_a_torn_line_is_no_record_and_takes_none_with_it(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, "key")
    spool.append(record(1))
    with (spool.folder / "records.jsonl").open("a") as stream:
        stream.write('{"op": "metr')
    assert [found["time"] for found, _ in spool.records()] == [1]
    spool.append(record(2))
    found = list(spool.records())
    assert [each["time"] for each, _ in found] == [1, 2]
    assert list(spool.records(found[0][1])) == found[1:] and found[-1][1] == spool.size()


def test_a_kept_file_stays_what_it_was(tmp_path: Path) -> None:
    spool, source, other = spool_of(tmp_path, "key"), tmp_path / "config.yaml", tmp_path / "other"
    source.write_text("first")
    spool.keep("config/config.yaml", source)
    spool.keep("config/config.yaml", source)  # told again
    other.write_text("second")
    other.replace(source)
    assert (spool.files / "config/config.yaml").read_text() == "first"
    spool.keep("config/config.yaml", source)
    assert (spool.files / "config/config.yaml").read_text() == "second"
    assert [path.name for path in (spool.files / "config").iterdir()] == ["config.yaml"]


def test_runs_are_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    for key, time in (("b", 2.0), ("c", 1.0), ("a", 3.0), ("c", 9.0)):
        spool_of(tmp_path, key).append({"op": "start", "key": key, "time": time})
    found = spools(tmp_path)
    assert [spool.key for spool in found] == ["c", "b", "a"]
    assert spools(tmp_path, found[:1]) == found


def test_progress_is_that_of_one_store(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, "key")
    progress = Progress("key", "http://a", "run", 7, True, series={"steps": Series("file", "digest", 3, 2)})
    spool.save(progress)
    assert spool.progress("http://a") == progress
    assert spool.progress("http://b") == Progress("key", "http://b")


def test_progress_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, "key")
    spool.progress_path().write_text("{")
    assert spool.progress("a") == Progress("key", "a")


def test_what_an_earlier_version_remembered_is_understood(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, "key")
    spool.progress_path().write_text(json.dumps({"key": "key", "uri": "a", "run_id": "r", "finished": True}))
    assert spool.progress("a") == Progress("key", "a", "r", finished=True)


def test_the_last_status_and_figures_count(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, "key")
    assert spool.status() is None and spool.figures() == {}
    for told in (
        {"op": "start"},
        {"op": "metrics", "metrics": {"a": 1.0, "b": 2.0}},
        {"op": "finish", "status": "KILLED"},
        {"op": "metrics", "metrics": {"a": 3.0}},
    ):
        spool.append({"key": "key", "time": 0.0, **told})
    assert spool.status() == "KILLED" and spool.figures() == {"a": 3.0, "b": 2.0}
