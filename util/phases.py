"""Time the phases of a run: a `PhaseClock` gathers seconds and counts of what runs inside `phase`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

READING = "waiting for images"
BACKBONE = "backbone"
TRANSFORMER = "transformer"
GRADIENTS = "gradients"
MOMENTS = "moments"
FITS = "fits"
SCORES = "scores of channels"
MAP = "mAP"
LATENCIES = "latencies"
TRAINING = "training"
EVALUATION = "evaluation"


@dataclass(eq=False)
class Stretch:
    """One stretch of a phase: how much it did (images, fits, ...), and its seconds without phases inside it."""

    count: float
    seconds: float = 0.0


class PhaseClock:
    """Seconds and counts of each phase. A phase inside another one counts only for itself.

    Attributes:
        entries: of each phase by name, in the order in which they began.
    """

    def __init__(self, device: torch.device) -> None:
        """At the end of each phase, wait for the work that a GPU `device` still has to do."""
        self._device = device
        self.entries: dict[str, list[Stretch]] = {}
        self._open: list[Stretch] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[PhaseClock]:
        """Gather all phases of this thread inside the context; a clock that ran before stands still."""
        _clocks.append(self)
        try:
            yield self
        finally:
            _clocks.remove(self)

    @contextmanager
    def phase(self, name: str, count: float) -> Iterator[Stretch]:
        """See the function `phase`."""
        self._charge()
        entry = Stretch(count)
        self.entries.setdefault(name, []).append(entry)
        self._open.append(entry)
        try:
            yield entry
        finally:
            self._charge()
            # By identity: a generator that is closed late may end a phase after the one around it.
            self._open = [other for other in self._open if other is not entry]

    def _charge(self) -> None:
        """Add the time since the last call to the innermost phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self._open[-1].seconds += now - self._since
        self._since = now

    def count(self, name: str) -> float:
        """Return how much a phase did in all."""
        return sum(entry.count for entry in self.entries.get(name, ()))

    def seconds(self, name: str) -> float:
        """Return the seconds of a phase."""
        return sum(entry.seconds for entry in self.entries.get(name, ()))

    def to_dict(self) -> list[dict[str, Any]]:
        """Return count and seconds of each phase as JSON values."""
        return [
            {"phase": name, "done": round(self.count(name), 3), "seconds": round(self.seconds(name), 3)}
            for name in self.entries
        ]

    def seconds_each(self, name: str) -> float:
        """Return the seconds for a count of one, without the first stretch if there are more, which warms up."""
        entries = self.entries.get(name, [])
        counted = [entry for entry in entries if entry.count]
        left_out = counted[:1] if len(counted) > 1 else []
        used = [entry for entry in entries if entry not in left_out]
        count = sum(entry.count for entry in used)
        return sum(entry.seconds for entry in used) / count if count else 0.0


_clocks: list[PhaseClock] = []


@contextmanager
def phase(name: str, count: float = 0.0) -> Iterator[Stretch]:
    """Charge what runs inside the context to a phase of the running clock, if there is one.

    Args:
        count: how much is done: images, fits. It may also be added to the yielded entry.
    """
    if not _clocks:
        yield Stretch(count)
        return
    with _clocks[-1].phase(name, count) as entry:
        yield entry


class TimedBatches:
    """Batches (inputs, targets) that charge their reading to the phase `READING`; its count is that of the images.

    Attributes:
        images: those read so far.
    """

    def __init__(self, batches: Any) -> None:
        self._batches, self.images = batches, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        batches = iter(self._batches)
        while True:
            with phase(READING) as entry:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                entry.count = len(batch[1])
            self.images += len(batch[1])
            yield batch
