"""Colour text on terminals."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TextIO

from termcolor import colored


def paint(text: str, colour: str | None, stream: TextIO, attrs: Iterable[str] = ()) -> str:
    """Return `text` with the escape codes of a colour if `stream` is a terminal.

    The variable NO_COLOR turns colours off, FORCE_COLOR turns them on everywhere, and TERM=dumb means no terminal.

    Args:
        text: text to print.
        colour: a termcolor colour, or None.
        stream: the stream that `text` is printed to.
        attrs: termcolor attributes, such as bold.
    """
    if os.environ.get("NO_COLOR"):
        wanted = False
    elif os.environ.get("FORCE_COLOR"):
        wanted = True
    else:
        wanted = stream.isatty() and os.environ.get("TERM") != "dumb"
    # Force the colour, since termcolor only checks stdout, and only once.
    return colored(text, colour, attrs=list(attrs), force_color=True) if wanted else text
