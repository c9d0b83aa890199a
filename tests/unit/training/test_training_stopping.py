from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# A second signal at the N-th time that the handler enters or leaves threading, where it may hold a lock.
CODE = """
import os, signal, sys
from pipeline.training.stopping import {name}

left = {at}

def interrupt(frame, event, argument):
    global left
    if event in ("call", "return") and frame.f_code.co_filename.endswith("threading.py"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, lambda *_: None)
{enter}
sys.setprofile(interrupt)
os.kill(os.getpid(), signal.SIGTERM)
sys.setprofile(None)
print(asked())
"""
ENTER = {
    "stop_on_sigterm": "held = stop_on_sigterm()\nasked = held.__enter__()",
    "note_every_sigterm": "asked = note_every_sigterm()",
}


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ENTER)
def test_a_signal_that_interrupts_the_handler_of_another_is_noted(name: str, at: int) -> None:
    code = CODE.format(name=name, enter=ENTER[name], at=at)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
