"""Every message that a user can meet is in the table of tests/messages: thing, value, what is allowed, fix."""

from __future__ import annotations

import ast
import collections
import difflib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from messages import recorder, refusals
from messages.table import TABLE, Message
from messages.walk import HOLE, ROOT, Site, sites

from pipeline import cli
from pipeline.errors import PipelineError

Heard = dict[tuple[str, str, str, str], list[str]]
"""File, function and words of a place, and what provoked it → the messages."""
LISTED = [(file, message) for file, messages in TABLE.items() for message in messages]
TESTS = sorted({message.by for _, message in LISTED if message.heard and "::" in message.by})
ALL = {**refusals.REFUSALS, **refusals.FAILURES}


def key(site: Site, by: str) -> tuple[str, str, str, str]:
    return site.file, site.where, site.text, by


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    """Everything that the table's tests and refusals made the program say: the tests run once more, in one process."""
    found: Heard = collections.defaultdict(list)
    for name, provoke in ALL.items():
        with recorder.listening() as listener, pytest.raises(PipelineError) as caught:
            provoke(tmp_path_factory.mktemp("refusal"))
        assert name in refusals.FAILURES or caught.value.exit_code == 2, name
        for site, message in listener.heard:
            found[key(site, name)].append(message)
    file = tmp_path_factory.mktemp("messages") / "heard.jsonl"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "messages.recorder", "-p", "no:xdist", "-q", *TESTS],
        cwd=ROOT, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), recorder.FILE: str(file)},
    )  # fmt: skip
    for line in file.read_text(encoding="utf-8").splitlines():
        node, *place, message = json.loads(line)
        found[(*place, node.partition("[")[0])].append(message)
    return found


def line(site: Site) -> str:
    """An entry for the table, to be filled in."""
    entry = {"where": site.where, "text": site.text, "by": "tests/…::test_…", "names": "…", "fix": "…"}
    return f"{site.file}: {json.dumps(entry, ensure_ascii=False)}"


def test_every_place_that_makes_a_message_is_in_the_table_and_nothing_else() -> None:
    known = {(file, message.where, message.text) for file, message in LISTED}
    there = {(site.file, site.where, site.text): site for site in sites()}
    missing, stale = [site for place, site in there.items() if place not in known], sorted(known - there.keys())
    advice = []
    for site in missing:
        close = difflib.get_close_matches(site.text, [text for file, _, text in stale if file == site.file], 1, 0.6)
        advice.append(f"{'change' if close else 'add'} {line(site)}" + (f"  # was {close[0]!r}" if close else ""))
    advice += [f"remove (unless changed above) {file} {where} {text!r}" for file, where, text in stale]
    assert not advice, "\n".join(["in tests/messages/table.yaml:", *advice])
    assert len(LISTED) == len(known) > 250


@pytest.mark.parametrize("file", TABLE)
def test_what_is_said_names_the_thing_the_value_what_is_allowed_and_the_fix(heard: Heard, file: str) -> None:
    there = {(site.where, site.text): site for site in sites() if site.file == file}
    wrong = []
    for message in TABLE[file]:
        site = there.get((message.where, message.text))
        if site is None:
            continue  # the test above says so
        said = heard[key(site, message.by)] if message.heard else [site.text]
        if not said:
            wrong.append(f"{message.by} does not provoke {site.file}:{site.lines[0]} {site.text!r}")
        elif not any(all(part in text for part in message.parts) for text in said):
            wrong.append(f"{site.file}:{site.lines[0]}: not all of {message.parts} are in {min(said, key=len)!r}")
        if not message.fix and site.kind != "warning":
            wrong.append(f"{site.file}:{site.lines[0]}: nothing says what to do")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("file", "message"), [pair for pair in LISTED if not pair[1].heard])
def test_what_another_process_says_has_a_test_there(file: str, message: Message) -> None:
    path, _, name = message.by.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, message.by


def test_most_are_provoked() -> None:
    provoked = sum(message.heard for _, message in LISTED)
    assert provoked >= 0.8 * len(LISTED), f"{provoked} of {len(LISTED)}"


def test_the_walk_sees_messages_in_all_their_forms() -> None:
    kinds = collections.Counter(site.kind for site in sites())
    assert {
        "ConfigError",
        "DataError",
        "ModelError",
        "ArtifactError",
        "TrainingError",
        "ValueError",
        "warning",
        "print",
    } <= kinds.keys()
    assert sum(1 for site in sites() if site.text.replace(HOLE, "").strip(" :,()")) > 0.9 * len(sites())


def test_an_expected_failure_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distilllens", "validate", "/no/such/file.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: /no/such/file.yaml: 1 problem")

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted; run the same command again to go on\n"
