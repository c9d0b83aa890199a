"""The page: what it says, what it never says, and that nothing in it is markup but the template's."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.reporting.aggregate import AVERAGE, RunScores, result_rows, table
from pipeline.reporting.compare import Comparison, Contrast, Standing
from pipeline.reporting.differences import Difference
from pipeline.reporting.paper import Score
from pipeline.reporting.render import (
    Answer,
    Cells,
    Example,
    Page,
    Picture,
    html_page,
    markdown_table,
    p_text,
    said,
    signed,
    standing_text,
)
from pipeline.reporting.statistics import Effect, Verdict

CELLS = table(
    result_rows(
        [
            RunScores("teacher", None, "a", {"rouge_l": [30.0, 32.0]}),
            RunScores("kd", 1, "a", {"rouge_l": [20.0, 22.0]}),
            RunScores("kd", 2, "a", {"rouge_l": [24.0, 26.0]}),
            RunScores("sft", 1, "a", {"rouge_l": [10.0, 11.0]}),
        ]
    )
)
STANDINGS = {"a": Standing("kd", ("sft",)), AVERAGE: Standing("kd", ())}


def contrast(verdict: Verdict, method: str = "sft", benchmark: str = AVERAGE, low: float = -2.0) -> Contrast:
    return Contrast(method, benchmark, Effect(-0.5, low, 1.0, 0.3, 0.2, 50, 1, False), 0.6, verdict)


def page(cells: Cells = CELLS, **parts: object) -> str:
    return html_page(Page("n", "d", "h", cells, **parts))  # type: ignore[arg-type]


class Tags(HTMLParser):
    """Opened and closed tags, and attributes of every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    (tmp_path / "f.svg").write_text("<svg/>")
    picture = Picture("a <figure>", tmp_path / "f.svg", "how <to>")
    text = html_page(
        Page(
            evil, evil, evil, table(result_rows([RunScores("<kd>", 1, "<a>", {"rouge_l": [1.0]})])),
            notes=[evil], others={"judge": table(result_rows([RunScores("<kd>", 1, "a", {"judge": [6.5]})]), "judge")},
            costs={"<kd>": {"steps": "3"}}, shared_costs=[evil], differences=[Difference("a.<alpha>_x", {"kd": "<0.5>"})],
            figures={"scores": [picture]}, rule=evil, limits=[evil], provenance={evil: {"commit": "<b>"}},
            examples=[Example(evil, evil, [evil], [Answer(evil, evil, 3.0)], [Answer("x", evil, 0.0)])],
            comparison=Comparison("<base>", (contrast("better", "<m>"),), (contrast("better", "<m>", "<a>"),)),
        )
    )  # fmt: skip
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert {tag for tag, _ in Tags(text).seen}.isdisjoint({"kd", "a>", "b", "m", "base", "figure>", "to", "script"})
    assert (
        "<h2>judge</h2>" in text and "<td>6.50</td>" in text and "&lt;0.5&gt;" in text and "a.<wbr>&lt;alpha&gt;_<wbr>x" in text
    )
    assert 'src="data:image/svg+xml;base64,PHN2Zy8+" alt="a &lt;figure&gt;. how &lt;to&gt;"' in text
    assert "http" not in text  # nothing is fetched from anywhere


def test_an_empty_page_and_a_full_one_are_well_formed() -> None:
    full = page(
        standings=STANDINGS, comparison=Comparison("kd", (contrast("worse"),), (contrast("worse", benchmark="a"),) * 2),
        limits=["l"], costs={"kd s1": {"steps": "3"}}, differences=[Difference("x", {"kd": "1", "sft": "2"})],
        examples=[Example("t", "p", ["r"], [Answer("kd", "", 0.0)])], provenance={"g": {"n": "v"}},
    )  # fmt: skip
    for text in (page(), full):
        tags = Tags(text)
        assert tags.open == []
        assert [tag for tag, _ in tags.seen if tag in ("header", "main", "nav", "h1")] == ["header", "h1", "nav", "main"]
        ids = {found["id"] for _, found in tags.seen if "id" in found}
        links = {str(found["href"])[1:] for tag, found in tags.seen if tag == "a"}
        assert links <= ids
        boxes = [found for _, found in tags.seen if str(found.get("class", "")).startswith("wide")]
        assert boxes and all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)
        assert all("scope" in found for tag, found in tags.seen if tag == "th")


def test_scores_have_both_deviations_and_say_where_they_stand() -> None:
    text = page(standings=STANDINGS, orientation=["teacher"])
    kd = re.search(r'<th scope="row">kd</th>(.*?)</tr>', text, re.DOTALL)
    assert kd is not None
    assert "<td><strong>23.00 ± 2.83</strong>" in kd[1] and "(highest)" in kd[1] and "decoding ± 1.41" in kd[1]
    assert "<u>10.50</u>" in text and "(not separated from the highest)" in text
    assert '<tr class="soft"><th scope="row">teacher</th>' in text


def test_the_papers_score_stands_beside_ours() -> None:
    score = Score("s", "t", "kd", "a", 24.5, 0.3, "somewhere")
    assert "paper 24.50, ours −1.50" in page(published={("kd", "a"): score})
    assert "ours −" not in page() and ", and the paper" not in page()


@pytest.mark.parametrize("verdict", ["better", "worse", "not separated"])
def test_a_method_that_is_not_separated_is_never_a_winner(verdict: Verdict) -> None:
    text = page(comparison=Comparison("kd", (contrast(verdict),), (contrast(verdict, benchmark="a"),)))
    expected = "not separated at this budget" if verdict == "not separated" else f"{verdict} than kd"
    assert text.count(f'<td class="word">{expected}</td>') == 1
    assert ("better than" in text) == (verdict == "better")


def test_an_infinite_interval_is_shown() -> None:
    assert "−∞ to +1.00" in page(comparison=Comparison("kd", (contrast("not separated", low=float("-inf")),), ()))


def test_numbers_have_a_true_sign() -> None:
    assert [signed(value) for value in (1.2, -0.345, 0.001, -0.001)] == ["+1.20", "−0.34", "0.00", "0.00"]
    assert (p_text(0.0005), p_text(0.04)) == ("< 0.001", "0.040")
    assert said(contrast("better"), "kd") == "better than kd"


def test_the_highest_is_called_best_of_all_only_where_it_is_separated() -> None:
    assert standing_text(None) == ""
    assert standing_text(Standing("kd", ())).endswith("separated from every other method.")
    assert standing_text(Standing("kd", ("sft", "jsd"))).endswith("not separated from it: sft, jsd.")


def test_markdown_marks_the_best_and_its_ties() -> None:
    lines = markdown_table(CELLS, STANDINGS).splitlines()
    assert lines[3] == "| kd | **23.00 ± 2.83** | **23.00 ± 2.83** |"
    assert lines[4] == "| sft | <u>10.50 (± 0.71)</u> | 10.50 (± 0.71) |"
