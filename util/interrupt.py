"""Ctrl-C that lets the step in flight finish."""

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
    """Inside, the first Ctrl-C only takes note; the function that is given raises `KeyboardInterrupt` then.

    Call it in every process where a step is done and saved; with several processes one Ctrl-C stops all. A second
    Ctrl-C stops at once.

    Args:
        hint: how to go on, the message of the exception.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if distributed.is_main():
            # torchrun waits 30 seconds for its processes, then kills them: the way on is told now, too.
            print(f"\nstopping after this step; Ctrl-C again stops at once. {hint}", file=sys.stderr, flush=True)

    def raise_if_asked() -> None:
        if any(distributed.gather_objects(asked)):
            raise KeyboardInterrupt(hint)

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield raise_if_asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_asked
    finally:
        signal.signal(signal.SIGINT, before)
