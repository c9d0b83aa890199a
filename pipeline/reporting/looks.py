"""How figures look: one style, and for each method a colour, a marker and a dash of its own, whichever others are there.

Lines are told apart by more than colour (Okabe and Ito's palette), and equal figures are equal bytes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from matplotlib import style

FONT = "DejaVu Sans"  # comes with matplotlib
WIDTH = 9.0
"""Inches: legible at 900 pixels."""
TITLE_FONT = 9
HEAT_COLOURS = "viridis_r"
"""Colours of a heat map: equal steps look equal, to colour-blind eyes too; light is low."""
_RC = {
    "font.family": FONT,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": TITLE_FONT,
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    # Names in an SVG are hashes of their content and this, not of a random number.
    "svg.hashsalt": "distilllens",
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and line style of a method."""

    colour: str
    marker: str
    dashes: str = "-"


# A method keeps its look whichever others are there; a mixture is dashed in the colour of what it mixes.
_LOOKS = {
    "untrained": Look("#767676", "x", ":"),
    "sft": Look("#000000", "s"),
    "seqkd": Look("#000000", "D", "--"),
    "kd": Look("#0072B2", "^"),
    "fkl_rkl": Look("#0072B2", "P", "--"),
    "rkl": Look("#56B4E9", "v"),
    "jsd": Look("#009E73", "<"),
    "akl": Look("#009E73", ">", "--"),
    "mse": Look("#CC79A7", "*"),
    "distilllens": Look("#D55E00", "o"),
}
_OTHER_LOOKS = [
    Look(colour, marker, dashes)
    for dashes in ("-", "--", "-.")
    for colour, marker in (("#E69F00", "h"), ("#8C6D31", "s"), ("#4B3F8F", "^"), ("#B22222", "v"))
]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Name → look; names that no look belongs to take the others in turn."""
    others = itertools.cycle(_OTHER_LOOKS)
    return {name: _LOOKS.get(name) or next(others) for name in names}


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """The style of every figure of a report."""
    # The defaults first: a user's own settings must not change a report.
    with style.context(["default", _RC], after_reset=True):
        yield
