"""Batches of a sample, timed without what a run does once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from util import distributed
from util.phases import READING, PhaseClock, phase, timed

AGREEMENT = 1.1  # ratio of the two fastest passes of a batch that agree
MOST_PASSES = 6
ENOUGH_SECONDS = 5.0  # of the passes of one kind on a batch


@dataclass(frozen=True)
class Pace:
    """Seconds for an image: of one core to read it, and of the device to compute."""

    reading: float = 0.0
    computing: float = 0.0


class SampledBatches:
    """Batches (inputs, targets), each given again until its two fastest passes take about as long.

    The first pass on images of a new size, or with another number of denoising queries, can take seconds longer, in
    which kernels are loaded and planned and memory is allocated. A run does that once for many batches, so only the
    fastest pass of each batch counts. Passes end after `ENOUGH_SECONDS`, of which what is done once is a small part.
    All processes give each batch equally often.

    Where a run has fewer optimizer steps than batches, there are two kinds of passes in turn, without a step and with
    one. Both are timed, and each batch of the run counts its share of a step.

    Args:
        batches: a loader; it reads each batch once.
        name: phase of what is done with a batch.
        device: whose work counts.
        steps_each: optimizer steps of the run for each of its batches, in (0, 1]; 1 where there are none.

    Attributes:
        accumulate: passes for an optimizer step, 1 or 2, to train with.
    """

    def __init__(self, batches: Any, name: str, device: torch.device, steps_each: float = 1.0) -> None:
        self._batches, self._name, self._steps_each = batches, name, steps_each
        self.accumulate = 1 if steps_each == 1 else 2
        self._clock = PhaseClock(device, waits=True)
        self._images, self._seconds = 0, 0.0

    def __len__(self) -> int:
        """Return the largest number of passes."""
        return MOST_PASSES * self.accumulate * len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """Yield each batch for every pass; what happens until the next one is asked for is a pass."""
        with self._clock.running():
            for batch in timed(self._batches, READING, lambda batch: len(batch[1])):
                kinds: list[list[float]] = [[] for _ in range(self.accumulate)]
                while not all(_are_enough(seconds) for seconds in kinds):
                    for seconds in kinds:
                        with phase(self._name) as stretch:
                            yield batch
                        seconds.append(max(distributed.gather_objects(stretch.seconds)))
                self._images += len(batch[1])
                self._seconds += self._steps_each * min(kinds[-1]) + (1 - self._steps_each) * min(kinds[0])

    @property
    def pace(self) -> Pace:
        """The pace of the batches so far."""
        return Pace(self._clock.seconds_each(READING), self._seconds / max(1, self._images))


def _are_enough(seconds: Sequence[float]) -> bool:
    if len(seconds) < 2:
        return sum(seconds) >= ENOUGH_SECONDS
    fastest, second, *_ = sorted(seconds)
    return second <= AGREEMENT * fastest or len(seconds) == MOST_PASSES or sum(seconds) >= ENOUGH_SECONDS
