"""Handle Ctrl-C after the current step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from util import distributed


@contextmanager
def stop_after_step(hint: str) -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C: the yielded function raises `KeyboardInterrupt` if Ctrl-C was pressed inside the context.

    Call that function in every process after a step is done and saved; one Ctrl-C then stops all processes. A second
    Ctrl-C stops at once.

    Args:
        hint: how to resume; the message of the exception.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if distributed.is_main():
            # Print the hint now, too: torchrun kills its processes after 30 seconds.
            print(f"\nstopping after this step; Ctrl-C again stops at once. {hint}", file=sys.stderr, flush=True)

    def raise_if_asked() -> None:
        if any(distributed.gather_objects(asked)):
            raise KeyboardInterrupt(hint)

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield raise_if_asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_asked
    finally:
        signal.signal(signal.SIGINT, before)
