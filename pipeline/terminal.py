"""What goes to a terminal from elsewhere: libraries, servers, models and artifacts can put anything into a message."""

from __future__ import annotations

import logging
import re
import sys

# Escapes and other control characters but tabs and line ends, and those that change the direction of writing around them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    r"""The text with codes such as `\x1b` in the place of characters that a terminal would obey."""
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def log_to_terminal(layout: str) -> None:
    """Send warnings, and what the callers ask for beside them, to standard error.

    Args:
        layout: of a line, in logging's terms.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter(layout))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
