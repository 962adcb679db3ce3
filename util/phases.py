"""Time the phases of a run: a `PhaseClock` gathers seconds and counts of what runs inside `phase`."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

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
DETECTION = "detection"
DRAWING = "drawing"
TIMINGS = "timings"
CHECKS = "checks"
CALIBRATION = "calibration"


Batch = TypeVar("Batch")
Moment = float | torch.cuda.Event  # seconds, or a point in the work of a GPU


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

    def __init__(self, device: torch.device, *, waits: bool = False) -> None:
        """Time phases that use `device`.

        The work of a GPU counts for the phase that started it. `waits` makes the CPU wait for it at the end of each
        phase, so that nothing overlaps. Otherwise only the methods that return seconds wait.
        """
        self._device, self._waits = device, waits
        self.entries: dict[str, list[Stretch]] = {}
        self._open: list[Stretch] = []
        self._since: Moment = 0.0
        self._intervals: collections.deque[tuple[Stretch, Moment, Moment]] = collections.deque()

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
        """Charge the time since the last call to the innermost phase."""
        now = self._moment()
        if self._open:
            self._intervals.append((self._open[-1], self._since, now))
        self._since = now
        self._settle()

    def _moment(self) -> Moment:
        """Return the time; of a GPU that the CPU does not wait for, the moment when it will have done its work."""
        if self._device.type != "cuda":
            return time.perf_counter()
        if self._waits:
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _settle_all(self) -> None:
        """Wait for the GPU, and add all intervals to their stretches."""
        if not isinstance(self._since, float):
            self._since.synchronize()
        self._settle()

    def _settle(self) -> None:
        """Add the intervals that are over to their stretches."""
        while self._intervals:
            stretch, start, end = self._intervals[0]
            if isinstance(start, float) or isinstance(end, float):
                stretch.seconds += end - start  # type: ignore[operator]
            else:
                if not end.query():
                    return
                stretch.seconds += start.elapsed_time(end) / 1000
            self._intervals.popleft()

    def count(self, name: str) -> float:
        """Return how much a phase did in all."""
        return sum(entry.count for entry in self.entries.get(name, ()))

    def seconds(self, name: str) -> float:
        """Return the seconds of a phase."""
        self._settle_all()
        return sum(entry.seconds for entry in self.entries.get(name, ()))

    def to_dict(self) -> list[dict[str, Any]]:
        """Return count and seconds of each phase as JSON values."""
        return [
            {"phase": name, "done": round(self.count(name), 3), "seconds": round(self.seconds(name), 3)}
            for name in self.entries
        ]

    def seconds_each(self, name: str) -> float:
        """Return the seconds for a count of one, without the first stretch if there are more, which warms up."""
        self._settle_all()
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


def timed(batches: Iterable[Batch], name: str, count: Callable[[Batch], float]) -> Iterator[Batch]:
    """Yield the batches, and charge their reading to a phase; `count` returns how much a batch counts."""
    iterator = iter(batches)
    while True:
        with phase(name) as entry:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            entry.count = count(batch)
        yield batch


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
        for batch in timed(self._batches, READING, lambda batch: len(batch[1])):
            self.images += len(batch[1])
            yield batch
