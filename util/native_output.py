"""Output of native libraries."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_native_stdout() -> Iterator[None]:
    """Discard what native code prints to stdout inside the block.

    Nothing else must print meanwhile. Does nothing where the process has no stdout.
    """
    flush = ctypes.CDLL(None).fflush  # C's own buffer would be printed later
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, AttributeError, ValueError):
        yield
        return
    try:
        flush(None)
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
    finally:
        os.close(kept)
