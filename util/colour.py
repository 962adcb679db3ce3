"""Colours on terminals, and only there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TextIO

from termcolor import colored


def paint(text: str, colour: str | None, stream: TextIO, attrs: Iterable[str] = ()) -> str:
    """`text` with the escape codes of a colour if it goes to a terminal.

    With NO_COLOR in the environment, or TERM=dumb, it stays as it is; with FORCE_COLOR it is coloured wherever it goes.

    Args:
        text: what is printed.
        colour: one of termcolor's, or None.
        stream: where `text` is printed.
        attrs: termcolor's attributes, such as bold.
    """
    if os.environ.get("NO_COLOR"):
        wanted = False
    elif os.environ.get("FORCE_COLOR"):
        wanted = True
    else:
        wanted = stream.isatty() and os.environ.get("TERM") != "dumb"
    # Said outright: by itself termcolor looks at stdout alone, and only once.
    return colored(text, colour, attrs=list(attrs), force_color=True) if wanted else text
