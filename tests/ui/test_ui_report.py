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


@pytest.mark.parametrize("width", [390, 1280])
def test_it_does_not_scroll_sideways(open_page: Callable[..., Any], report: str, width: int) -> None:
    browser = open_page(report, width=width, height=844)
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    sizes = "return [window.innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    inner, root, body = browser.execute_script(sizes)
    assert inner == width and root <= width and body <= width


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
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


def test_tab_reaches_links_tables_and_generations_visibly(open_page: Callable[..., Any], report: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_page(report, width=390, height=844)
    reached = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        if focused.tag_name in ("body", "html"):
            break
        style = "const s = getComputedStyle(arguments[0]); return s.outlineStyle !== 'none' || s.boxShadow !== 'none'"
        assert browser.execute_script(style, focused), focused.get_attribute("outerHTML")[:120]
        reached.add(focused.tag_name)
    assert {"a", "summary", "div"} <= reached
