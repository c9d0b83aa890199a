"""Known vulnerabilities of the tested set by pip-audit, or one line that says why nothing was audited (`make checks`)."""

from __future__ import annotations

import subprocess
import sys

import httpx

_INDEX = "https://pypi.org/pypi"
_ASKED = "pip/24.0"
"""A release that is there for ever."""
_SECONDS = 10.0


def why_not(client: httpx.Client) -> str | None:
    """Why the index cannot tell vulnerabilities, None where it can.

    Mirrors answer for packages and not for the releases' vulnerabilities; pip-audit then skips every package and says that
    it found nothing.
    """
    try:
        answer = client.get(f"{_INDEX}/{_ASKED}/json", timeout=_SECONDS, follow_redirects=True)
    except httpx.HTTPError:
        return "no index reachable"
    try:
        knows = answer.status_code == httpx.codes.OK and "vulnerabilities" in answer.json()
    except ValueError:
        knows = False
    return None if knows else f"the index answers ({answer.status_code}) but does not tell vulnerabilities"


def main(constraints: str) -> int:
    """Audit the packages of a constraints file; returns an exit code."""
    with httpx.Client() as client:
        reason = why_not(client)
    if reason is not None:
        print(f"pip-audit: {reason}, nothing was audited")
        return 0
    command = [sys.executable, "-m", "pip_audit", "-r", constraints, "--no-deps", "--disable-pip"]
    return subprocess.run(command, check=False).returncode  # noqa: S603 (no shell, nothing from elsewhere)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
