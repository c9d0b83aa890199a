"""What continuous integration does about a browser, with every command that it calls replaced."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / ".ci" / "run"
MAKE = 'echo "$@: ${DISTILLLENS_BROWSER-unset}" > made'
BROWSER = ("chromium", "chromedriver")


@dataclass(frozen=True)
class Machine:
    """A checkout and the only folder in which commands are looked for."""

    root: Path

    def command(self, name: str, script: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def apt(self, update: int = 0, simulate: int = 0, install: int = 0) -> None:
        """An apt-get whose steps end with these codes; an installation that ends well leaves a browser."""
        made = [f"{self.root}/bin/{name}" for name in BROWSER]
        browser = "; ".join(f"printf '#!/bin/sh\\n' > {path}; chmod +x {path}" for path in made)
        self.command(
            "apt-get",
            f'echo "$@" >> {self.root}/asked\ncase "$*" in\n*update*) exit {update};;\n*--simulate*) exit {simulate};;\n'
            f"*install*) [ {install} = 0 ] || exit {install}; {browser};;\nesac",
        )

    def asked(self) -> str:
        asked = self.root / "asked"
        return asked.read_text() if asked.exists() else ""

    def run(self, **env: str) -> tuple[str, str]:
        """What `make` was called with, and what was said."""
        bash = shutil.which("bash")
        done = subprocess.run(
            [str(bash), ".ci/run"], cwd=self.root, env={"PATH": str(self.root / "bin"), **env}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return (self.root / "made").read_text().rstrip("\n"), done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    for name in ("dirname", "env", "chmod"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    made = Machine(tmp_path)
    made.command("make", MAKE)
    made.command("id", "echo 0")
    return made


def test_a_browser_that_is_there_is_required_and_nothing_is_installed(machine: Machine) -> None:
    for name in BROWSER:
        machine.command(name, "")
    machine.apt()
    assert machine.run() == ("test: required", "") and machine.asked() == ""


def test_a_browser_without_its_driver_is_completed_and_required(machine: Machine) -> None:
    machine.command("chromium", "")
    machine.apt()
    assert machine.run() == ("test: required", "")
    update, simulate, install = machine.asked().splitlines()
    assert "Error-Mode=any update" in update and "--simulate" in simulate
    assert install.endswith("chromium chromium-driver fonts-dejavu-core")


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        ({"update": 100, "simulate": 100}, "apt knows no chromium chromium-driver"),
        ({"simulate": 100}, "apt knows no chromium chromium-driver"),
        ({"update": 100, "install": 100}, "apt's index cannot be reached"),
    ],
)
def test_without_an_index_the_tests_go_on_and_it_is_said(machine: Machine, codes: dict[str, int], reason: str) -> None:
    machine.apt(**codes)
    made, said = machine.run()
    assert made == "test: unset"
    assert "no browser could be installed" in said and reason in said and "will be skipped" in said


def test_without_apt_the_tests_go_on_and_it_is_said(machine: Machine) -> None:
    made, said = machine.run()
    assert made == "test: unset" and "(no apt-get here): the browser's tests will be skipped" in said


def test_an_index_that_is_partly_out_of_reach_does_not_matter_if_the_packages_come(machine: Machine) -> None:
    machine.apt(update=100)
    assert machine.run() == ("test: required", "")


def test_an_installation_that_fails_is_no_reason_to_skip(machine: Machine) -> None:
    machine.apt(install=100)
    made, said = machine.run()
    assert made == "test: required" and "could not install" in said


def test_without_rights_nothing_is_installed_and_it_is_said(machine: Machine) -> None:
    machine.command("id", "echo 1000")
    machine.apt()
    made, said = machine.run()
    assert made == "test: unset" and "neither root nor sudo" in said and machine.asked() == ""
    machine.command("sudo", 'shift; exec "$@"')
    machine.command("true", "")
    assert machine.run() == ("test: required", "") and "install" in machine.asked()


def test_the_variable_decides_where_it_is_set(machine: Machine) -> None:
    machine.apt(simulate=100)
    assert machine.run(DISTILLLENS_BROWSER="") == ("test: ", "") and machine.asked() == ""
    assert machine.run(DISTILLLENS_BROWSER="required")[0] == "test: required"
