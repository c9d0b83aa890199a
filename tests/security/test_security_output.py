"""What a model wrote is text wherever it is shown: in the report, in the figures, in the tables for MLflow."""

from __future__ import annotations

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.errors import DataError
from pipeline.reporting.aggregate import RunScores, result_rows, table
from pipeline.reporting.render import Answer, Example, Page, html_page
from pipeline.terminal import plain
from pipeline.tracking import MLflowTracker

EVIL = [
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</title><iframe src=javascript:alert(1)>",
    "{{ 7*7 }}{% raw %}",
    "<!--",
    "]]><a href='javascript:alert(1)'>",
]


class Parsed(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(text: str) -> Parsed:
    scores = table(result_rows([RunScores(text, 1, text, {"rouge_l": [1.0]})]))
    example = Example(text, text, [text], [Answer(text, text, 3.0)], [Answer(text, text, 0.0)])
    return Parsed(html_page(Page(text, text, text, scores, notes=[text], rule=text, limits=[text], examples=[example])))


@pytest.mark.parametrize("text", EVIL)
def test_the_report_shows_markup_as_text(text: str) -> None:
    found, harmless = page(text), page("harmless")
    assert found.tags == harmless.tags and "script" not in found.tags
    assert [name for name, _ in found.attributes] == [name for name, _ in harmless.attributes]
    assert not any(name.startswith("on") or "javascript:" in (value or "") for name, value in harmless.attributes)
    assert text in "".join(found.words)


def test_each_text_of_the_report_has_its_own_direction_of_writing() -> None:
    """Right-to-left texts read right, and what changes the direction ends with its block."""
    found = page("\u202eעברית")
    assert found.attributes.count(("dir", "auto")) == found.tags.count("pre") >= 4


@pytest.mark.parametrize("text", EVIL)
def test_tables_for_mlflow_hold_it_as_json_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MLflowTracker(tmp_path, "e")
    tracker.log_table("run", {"prompt": [text], "response": [text]}, "generations.json")
    tracker.close(patience=0.1)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes().startswith(b'{"columns"')]
    assert [json.loads(path.read_text()) for path in kept] == [{"columns": ["prompt", "response"], "data": [[text, text]]}]
    # Only a name that ends in .json: the UI shows it as cells, never as a page of its own.
    root = Path(__file__).resolve().parents[2]
    sources = [path.read_text(encoding="utf-8") for name in ("pipeline", "tasks") for path in (root / name).rglob("*.py")]
    calls = re.findall(r"\.log_table\(.*", "\n".join(sources))
    assert calls and all('.json")' in call for call in calls)


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;title\x07", "\x9b31m", "a\rb", "\u202egnp.exe", "a\u2066b", "\ud800"])
def test_nothing_that_a_terminal_obeys_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Messages quote what libraries, servers, models and artifacts said."""

    def fails(**_: object) -> None:
        logging.getLogger("pipeline.somewhere").warning("a warning: %s", text)
        raise DataError(f"a reply: {text}\nsecond line")

    monkeypatch.setattr(cli, "app", fails)
    handlers = logging.root.handlers[:]
    logging.root.handlers[:] = []
    try:
        with pytest.raises(SystemExit):
            cli.main()
    finally:
        logging.root.handlers[:] = handlers
    shown = capsys.readouterr().err
    assert shown == f"a warning: {plain(text)}\nerror: a reply: {plain(text)}\nsecond line\n"
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_texts_of_people_stay_as_they_are() -> None:
    text = "Übersetze\t😀 👩‍🚀\nעברית العربية हिन्दी 漢字 \u200f"
    assert plain(text) == text
