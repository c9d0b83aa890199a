"""report.html in a browser: complete, silent, alone, narrow, and usable by keyboard and screen reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import METHODS, errors, hosts


@pytest.fixture
def report(run_dir: Path) -> str:
    return (run_dir / "tiny" / "comparison" / "report.html").resolve().as_uri()


def test_its_table_has_every_method_and_it_asks_nobody(open_page: Callable[..., Any], report: str) -> None:
    browser = open_page(report)
    names = [cell.text for cell in browser.find_elements("css selector", "#scores tbody th")]
    assert set(names) == {"teacher", "untrained", *METHODS}
    images = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(images) >= 5 and all(images)
    assert errors(browser) == [] and hosts(browser) == set()


@pytest.mark.parametrize("width", [390, 1440])
def test_it_does_not_scroll_sideways(open_page: Callable[..., Any], report: str, width: int) -> None:
    browser = open_page(report, width=width, height=844)
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    sizes = "return [window.innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    inner, root, body = browser.execute_script(sizes)
    assert inner == width and root <= width and body <= width


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing_serious(open_page: Callable[..., Any], report: str, width: int, dark: bool) -> None:
    import axe_core_python

    browser = open_page(report, width=width, height=844, dark=dark)
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    browser.execute_script((Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    result = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert {"color-contrast", "html-has-lang"} <= {rule["id"] for rule in result["passes"]}
    found = {
        rule["id"]: [node["html"][:120] for node in rule["nodes"]]
        for rule in result["violations"]
        if rule["impact"] in ("serious", "critical")
    }
    assert found == {}


@pytest.mark.parametrize("dark", [False, True])
def test_every_interactive_element_is_reached_by_tab_in_order_and_shows_it(
    open_page: Callable[..., Any], report: str, dark: bool
) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_page(report, width=390, height=844, dark=dark)
    # What a closed part holds cannot be reached until it is opened.
    wanted = "return [...document.querySelectorAll('a[href], summary, [tabindex]')].filter(e => e.checkVisibility())"
    expected = browser.execute_script(wanted)
    style = "const s = getComputedStyle(arguments[0]); return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2"
    for element in expected:
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        assert focused == element, (focused.get_attribute("outerHTML")[:120], element.get_attribute("outerHTML")[:120])
        assert browser.execute_script(style, focused), focused.get_attribute("outerHTML")[:120]
    assert {"a", "summary", "div"} <= {element.tag_name for element in expected}


def test_enter_opens_a_generation_and_space_closes_it(open_page: Callable[..., Any], report: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_page(report, width=390, height=844)
    closed = browser.find_element("css selector", "#generations > details:not([open])")
    summary, text = closed.find_element("css selector", "summary"), closed.find_element("css selector", "pre")
    assert not text.is_displayed()
    summary.send_keys(Keys.ENTER)
    assert text.is_displayed() and errors(browser) == []
    summary.send_keys(Keys.SPACE)
    assert not text.is_displayed()


def test_methods_are_explained_beside_their_scores(open_page: Callable[..., Any], report: str) -> None:
    browser = open_page(report)
    explained = {term.text for term in browser.find_elements("css selector", "#scores dt")}
    assert explained == set(METHODS)


def test_a_phone_shows_the_mean_beside_the_method(open_page: Callable[..., Any], report: str) -> None:
    browser = open_page(report, width=390, height=844)
    right = "return arguments[0].getBoundingClientRect().right"
    row = browser.find_element("css selector", "#scores tbody tr:last-child")
    heads = [head.text for head in browser.find_elements("css selector", "#scores thead th")]
    assert heads[:2] == ["method", "mean over benchmarks"]
    assert browser.execute_script(right, row.find_element("css selector", "td")) <= 390


@pytest.mark.parametrize("dark", [False, True])
def test_print_shows_everything_on_white(open_page: Callable[..., Any], report: str, dark: bool) -> None:
    browser = open_page(report, width=794, height=1123, dark=dark)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [scheme]})
    hidden = """
    return [...document.querySelectorAll('main *')].filter(e => !e.checkVisibility()).map(e => e.outerHTML.slice(0, 120))
    """
    assert browser.execute_script(hidden) == []
    look = (
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor, document.documentElement.scrollWidth]"
    )
    ink, paper, width = browser.execute_script(look)
    assert (ink, paper) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)") and width <= 794
    filters = "return [...document.images].map(i => getComputedStyle(i).filter)"
    assert set(browser.execute_script(filters)) == {"none"}
