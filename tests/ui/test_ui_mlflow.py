"""What a person sees in the MLflow UI of a finished experiment."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from browsing import BENCHMARKS, METHODS, SEEDS, errors, hosts, until

from pipeline.reporting.looks import looks

RUNS = {f"{method} s{seed}" for method in METHODS for seed in SEEDS}
# MLflow asks for accounts that a server without them does not have, and its charts change size while they are drawn.
ITS_OWN = ("mlflow/users/current", "ResizeObserver loop completed with undelivered notifications")


def alien(messages: list[str]) -> list[str]:
    return [message for message in messages if not any(known in message for known in ITS_OWN)]


def texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
    return list(browser.execute_script(script, selector))


def scores(run_dir: Path) -> dict[str, float]:
    with (run_dir / "tiny" / "comparison" / "results.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if (row["benchmark"], row["metric"]) == ("avg", "rouge_l")]
    return {f"{r['method']} s{r['train_seed']}" if r["train_seed"] else r["method"]: float(r["mean"]) for r in rows}


def charts(browser: Any) -> dict[str, dict[str, list[float]]]:
    """Title of a chart → run → steps of its curve."""
    script = """
    return [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(card => {
        const plot = card.querySelector('.js-plotly-plot');
        return [card.innerText.trim().split('\\n')[0],
                plot && plot.data ? plot.data.filter(t => t.type === 'scatter').map(t => [t.name, [...(t.x || [])]]) : []];
    })"""
    return {title: dict(traces) for title, traces in browser.execute_script(script)}


def colours(browser: Any) -> dict[str, str]:
    """Run → the colour of its curve of the training loss."""
    script = """
    const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
    const card = cards.find(card => card.innerText.trim().split('\\n')[0] === 'train/loss');
    return card.querySelector('.js-plotly-plot').data.map(t => [t.name, t.marker.color.slice(0, 7)]);
    """
    return {name: colour.lower() for name, colour in browser.execute_script(script)}


def test_the_runs_table_opens_on_the_leaderboard(open_page: Callable[..., Any], leaderboard: str, run_dir: Path) -> None:
    assert "workflowType=machine_learning" in leaderboard and "viewStateShareKey=leaderboard" in leaderboard
    browser = open_page(leaderboard, width=2600)
    wanted = [
        *(f"params.`{name}`" for name in ("method", "student", "train_seed")),
        *(f"metrics.`eval/{name}/rouge_l`" for name in ("avg", *BENCHMARKS)),
        *(f"metrics.`cost/{name}`" for name in ("tokens_per_second", "peak_memory_gib", "wall_seconds")),
    ]

    def columns() -> list[str]:
        ids = browser.execute_script(
            "return [...document.querySelectorAll('.ag-header-cell[col-id]')]"
            ".sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)"
            ".map(e => e.getAttribute('col-id'))"
        )
        return [name for name in ids if name.startswith(("params.", "metrics.", "tags."))]

    until(lambda: columns() == wanted, "the chosen columns")
    names = until(lambda: texts(browser, ".ag-cell[col-id='attributes.`Run Name`'] a"), "the runs")
    expected = scores(run_dir)
    assert set(names) == {"teacher", "untrained", *RUNS} == set(expected)
    cells = [float(text) for text in texts(browser, ".ag-center-cols-container [col-id='metrics.`eval/avg/rouge_l`']")]
    assert sorted(cells, reverse=True) == cells and len(cells) == len(expected)
    assert sorted(cells) == sorted(round(value, 4) for value in expected.values())
    methods = set(texts(browser, ".ag-center-cols-container [col-id='params.`method`']"))
    assert methods == {"teacher", "untrained", *METHODS}
    assert not alien(errors(browser))
    assert hosts(browser) == {"127.0.0.1"}


def test_the_description_has_the_table_and_opens_the_report(open_page: Callable[..., Any], leaderboard: str) -> None:
    browser = open_page(leaderboard)
    until(lambda: texts(browser, "table td"), "the table of the description")
    assert {"teacher", "untrained", *METHODS} <= set(texts(browser, "table tr td:first-child"))
    links = browser.execute_script("return [...document.querySelectorAll('a')].map(a => [a.textContent.trim(), a.href])")
    by_name = {name: href for name, href in links}
    assert set(BENCHMARKS) <= by_name.keys()
    browser.get(by_name["Report"])
    frame = until(lambda: browser.find_elements("css selector", "iframe"), "the report")[0]
    browser.switch_to.frame(frame)
    assert until(lambda: texts(browser, "h1"), "the report's title") and "distilllens" in texts(browser, "th")


def test_generations_stand_side_by_side(open_page: Callable[..., Any], leaderboard: str) -> None:
    browser = open_page(leaderboard)
    link = "return [...document.querySelectorAll('a')].find(a => a.href.includes('generations_general.json'))?.href"
    browser.get(until(lambda: browser.execute_script(link), "the link to the generations"))
    wanted = {"prompt", "references", "teacher", "untrained", *METHODS, "id"}
    until(lambda: wanted == set(texts(browser, "th, [role=columnheader]")), "a column for each method")
    heads = texts(browser, "th, [role=columnheader]")
    assert heads[:2] == ["prompt", "references"] and heads[-1] == "id"
    assert {"Runs", "Models"} <= set(texts(browser, "aside a"))  # not the pages for language model applications


def test_a_run_says_what_it_is_and_what_it_was_made_of(open_page: Callable[..., Any], leaderboard: str) -> None:
    browser = open_page(leaderboard, height=1600)
    link = "return [...document.querySelectorAll('a')].find(a => a.textContent.trim() === 'distilllens s10')?.href"
    browser.get(until(lambda: browser.execute_script(link), "the link to a run"))
    tags = ("stage", "method", "family", "teacher", "config_fingerprint", "git_commit")

    def described() -> str:
        text = str(browser.find_element("css selector", "body").text)
        return text if all(f"{tag}\n: " in text for tag in tags) else ""

    page = until(described, "its tags")
    assert "train (" in page and "Training" in page  # the data set with its digest, and what it was used for
    assert "eval/avg/rouge_l" in page and "train_seed" in page
    assert not alien(errors(browser))


def test_the_compare_page_draws_one_curve_for_each_run_and_shows_images(
    open_page: Callable[..., Any], leaderboard: str
) -> None:
    browser = open_page(f"{leaderboard}&compareRunsMode=CHART", height=2600)
    for name in ("dev/rouge_l", "dev/loss", "train/loss"):
        until(lambda name=name: set(charts(browser).get(name, {})) == RUNS, f"a curve of {name} for each run")  # type: ignore[misc]
    found, own = colours(browser), looks(METHODS)
    assert found == {run: own[run.split()[0]].colour.lower() for run in RUNS}
    steps = charts(browser)
    assert all(curve == list(range(1, 7)) for curve in steps["train/loss"].values())
    assert all(curve == [2, 4, 6] for name in ("dev/loss", "dev/rouge_l") for curve in steps[name].values())
    figures = [f"figures/{name}" for name in ("scores", "curves", "cost", "lens", "confidence", "heat")]  # as they lie

    def shown(name: str) -> int:
        """How many of a card's images are loaded; only what is in view is."""
        script = """
        const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
        const card = cards.find(card => card.innerText.trim().split('\\n')[0] === arguments[0]);
        if (!card) return 0;
        card.scrollIntoView({block: 'center'});
        return [...card.querySelectorAll('img')].filter(image => image.naturalWidth > 50).length;
        """
        return int(browser.execute_script(script, name))

    for header in browser.find_elements("css selector", "[data-testid='experiment-view-compare-runs-section-header']"):
        if "figures" in header.text:
            browser.execute_script("arguments[0].scrollIntoView()", header)
    for name in figures:
        until(lambda name=name: shown(name) > 1, f"images of several runs in {name}", 120)  # type: ignore[misc]
    assert not alien(errors(browser))
    assert hosts(browser) == {"127.0.0.1"}
