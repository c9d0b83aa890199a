"""The audit of dependencies says when it could not be done; the list of licences is that of what is installed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import httpx
import pytest

from pipeline import audit
from pipeline.licences import licence_of, licence_table

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
LISTED = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([\w.-]+) \| \d[^|]* \| (.+) \|$", LISTED, flags=re.MULTILINE))
# Packages whose metadata say nothing: read in the licence files that they bring.
UNKNOWN = {"huey", "skops"}


def reason(answer: Callable[[httpx.Request], httpx.Response]) -> str | None:
    return audit.why_not(httpx.Client(transport=httpx.MockTransport(answer)))


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("no route")


def test_an_index_that_cannot_tell_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert reason(unreachable) == "no index reachable"
    assert reason(lambda _: httpx.Response(404)) == "the index answers (404) but does not tell vulnerabilities"
    assert reason(lambda _: httpx.Response(200, text="<html>")) == "the index answers (200) but does not tell vulnerabilities"
    assert reason(lambda _: httpx.Response(200, json={"info": {}})) is not None
    assert reason(lambda _: httpx.Response(200, json={"vulnerabilities": []})) is None


@pytest.mark.parametrize("why", [None, "no index reachable"])
def test_the_audit_fails_with_what_it_finds_and_never_for_want_of_an_index(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str | None
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(audit, "why_not", lambda client: why)
    monkeypatch.setattr(audit.subprocess, "run", run)
    assert audit.main("constraints.txt") == (1 if why is None else 0)
    assert len(ran) == (why is None)
    assert capsys.readouterr().out == ("" if why is None else "pip-audit: no index reachable, nothing was audited\n")
    assert "-m pipeline.audit constraints.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    """Everything that pyproject.toml names, in every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {plain(re.split(r"[\[<>=~! ;]", line)[0]) for line in lines}


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_every_dependency_that_is_installed_is_listed() -> None:
    pinned = {plain(name) for name in re.findall(r"^([\w.-]+)==", CONSTRAINTS, flags=re.MULTILINE)}
    wanted = {name for name in pinned | required() | {"torch"} if installed(name)}
    missing = wanted - {plain(name) for name in ROWS}
    assert not missing, f"{sorted(missing)}: pin them in constraints.txt, and make docs/licences.md again (its head says how)"
    unknown = {plain(name) for name in ROWS} - pinned - {"torch"} - required()
    assert not unknown, f"{sorted(unknown)} are listed in docs/licences.md, but nothing asks for them"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_listed_licence_is_the_one_that_the_package_states(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed here")
    assert ROWS[name] == licence_of(metadata.metadata(name)).replace("|", "/")


def test_only_known_packages_do_not_state_a_licence() -> None:
    assert {name for name, licence in ROWS.items() if licence == "see the package"} == UNKNOWN


def test_the_table_is_made_of_the_constraints() -> None:
    assert licence_table("pytest==0\nno-such-package==1\n").splitlines()[-2:] == [
        f"| pytest | {metadata.version('pytest')} | MIT |",
        f"| torch | {metadata.version('torch')} | {licence_of(metadata.metadata('torch'))} |",
    ]
