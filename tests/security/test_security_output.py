"""What a model wrote is text wherever it is shown: in the report, in the figures, in the tables for MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting.aggregate import RunScores, result_rows, table
from pipeline.reporting.render import Answer, Example, Page, html_page
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


@pytest.mark.parametrize("text", EVIL)
def test_tables_for_mlflow_hold_it_as_json_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    sent: dict[str, Any] = {}

    class Client:
        def log_table(self, run_id: str, data: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
            sent[artifact_file] = json.loads(json.dumps(data))

    tracker = MLflowTracker.__new__(MLflowTracker)
    tracker._client, tracker.failures = Client(), []
    tracker.log_table("run", {"prompt": [text], "response": [text]}, "generations.json")
    assert sent == {"generations.json": {"prompt": [text], "response": [text]}} and not tracker.failures
    # Only a name that ends in .json: the UI shows it as cells, never as a page of its own.
    sources = [path.read_text(encoding="utf-8") for path in (Path(__file__).resolve().parents[2] / "tasks").glob("*.py")]
    assert not any("log_table" in source and '.html"' in source.partition("log_table")[2][:200] for source in sources)
