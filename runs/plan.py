"""What a run will take: images, passes and seconds of each phase, memory, and options that would save some.

The seconds come from a few batches that are timed before the run (`--plan` stops after them). The run gathers the truth
in the same phases with a `PhaseClock`, and prints both side by side at its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from datasets.coco_eval import GroundTruth, coco_stats
from engine import EvalResult
from util.logging import table
from util.memory import processes_here
from util.phases import MAP, PhaseClock, phase
from util.threads import usable_cores

AT_MOST, ABOUT = "at most", "about"
MAP_IMAGES = 500  # to time mAP, with the detections of the sample
WORTH = 0.1  # least fraction of the run that an option has to save to be named


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: one of `util.phases`.
        unit: what is counted.
        count: how much the main process has to do.
        seconds: of the main process.
        bound: "" if the count is exact, else `AT_MOST` or `ABOUT`.
    """

    name: str
    unit: str
    count: float
    seconds: float
    bound: str = ""

    @property
    def shown_count(self) -> str:
        """The count as text."""
        return f"{self.bound} {self.count:,.0f} {self.unit}".strip()


@dataclass(frozen=True)
class RunPlan:
    """An estimate of a run.

    Attributes:
        title: what is planned.
        phases: in the order of the run.
        facts: sentences about data and memory.
        advice: options that would make the run fit or faster, with what they would save.
        labels: names to show in place of those of phases.
    """

    title: str
    phases: Sequence[Phase]
    facts: Sequence[str] = ()
    advice: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of all phases."""
        return sum(planned.seconds for planned in self.phases)

    def seconds_of(self, name: str) -> float:
        """Return the seconds of a phase, 0 if the run has none."""
        return sum(planned.seconds for planned in self.phases if planned.name == name)

    @property
    def _bound(self) -> str:
        bounds = {planned.bound for planned in self.phases}
        return f"{AT_MOST} {ABOUT}" if AT_MOST in bounds and ABOUT not in bounds else ABOUT

    def text(self) -> str:
        """Return the table of phases, the facts and the advice."""
        rows = [
            (
                self._label(planned),
                planned.shown_count,
                _each(planned.seconds, planned.count),
                shown_time(planned.seconds),
            )
            for planned in self.phases
        ]
        rows.append(("total", "", "", f"{self._bound} {shown_time(self.seconds)}"))
        lines = [f"{self.title}:", table(("phase", "how much", "each", "estimate"), rows), *self.facts]
        if self.advice:
            lines += ["These options would help:", *(f"  {line}" for line in self.advice)]
        return "\n".join(lines)

    def compared(self, clock: PhaseClock, seconds: float) -> str:
        """Return the table of the estimate beside what the run has taken; `seconds` are those of the whole run."""
        rows = []
        for planned in self.phases:
            done, took = clock.count(planned.name), clock.seconds(planned.name)
            rows.append(
                (
                    self._label(planned),
                    planned.shown_count,
                    f"{done:,.0f}",
                    shown_time(planned.seconds),
                    shown_time(took),
                )
            )
        rest = seconds - sum(clock.seconds(planned.name) for planned in self.phases)
        rows.append(("the rest, such as this plan and files", "", "", "not estimated", shown_time(max(0.0, rest))))
        rows.append(("total", "", "", f"{self._bound} {shown_time(self.seconds)}", shown_time(seconds)))
        return table(("phase", "planned", "done", "estimate", "took"), rows)

    def to_dict(self, clock: PhaseClock) -> list[dict[str, Any]]:
        """Return the estimate and the truth of each phase as JSON values."""
        return [
            {
                "phase": planned.name, "unit": planned.unit, "bound": planned.bound or "exactly",
                "planned": round(planned.count, 3), "done": round(clock.count(planned.name), 3),
                "estimated_seconds": round(planned.seconds, 3), "seconds": round(clock.seconds(planned.name), 3),
            }
            for planned in self.phases
        ]  # fmt: skip

    def _label(self, planned: Phase) -> str:
        return self.labels.get(planned.name, planned.name)

    def advised(self, changes: Sequence[tuple[str, float]]) -> RunPlan:
        """Return a copy with advice for each (text, seconds saved) that is worth it, the most first."""
        worth = [(text, saved) for text, saved in changes if saved >= WORTH * self.seconds and saved > 0]
        lines = [
            f"{text}: {shown_time(self.seconds - saved)} instead of {shown_time(self.seconds)}"
            for text, saved in sorted(worth, key=lambda change: -change[1])
        ]
        return replace(self, advice=[*self.advice, *lines])


class Tally:
    """Adds up counts and seconds of phases."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._bounds: dict[str, str] = {}

    def add(self, name: str, count: float, seconds: float, bound: str = "") -> None:
        """Add to a phase; its bound is the loosest of all."""
        if not count and not seconds:
            return
        self.counts[name] = self.counts.get(name, 0) + count
        self.seconds[name] = self.seconds.get(name, 0) + seconds
        self._bounds[name] = max(self._bounds.get(name, ""), bound, key=("", AT_MOST, ABOUT).index)

    def phases(self, units: Mapping[str, str]) -> list[Phase]:
        """Return the phases in the order of `units`, the unit of each by name."""
        return [
            Phase(name, unit, self.counts[name], self.seconds[name], self._bounds[name])
            for name, unit in units.items()
            if name in self.counts
        ]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the state of all random generators after the context."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


Snapshot = dict[str, tuple[float, float]]


def spent_in(clock: PhaseClock, action: Callable[[], Any]) -> Snapshot:
    """Run `action`; return count and seconds of each phase of it."""
    before = {name: (clock.count(name), clock.seconds(name)) for name in clock.entries}
    action()
    spent = {}
    for name in clock.entries:
        count, seconds = before.get(name, (0.0, 0.0))
        spent[name] = clock.count(name) - count, clock.seconds(name) - seconds
    return spent


def seconds_of_map(ground_truth: GroundTruth, ids: Sequence[int], result: EvalResult) -> float:
    """Return the seconds of mAP for an image, measured on some of the images `ids` with the sample's detections."""
    ids, detections = ids[:MAP_IMAGES], result.detections
    of_image = [detections[detections[:, 0] == image] for image in result.image_ids]
    rows = [of_image[place % len(of_image)].copy() for place in range(len(ids))]
    for image, of_one in zip(ids, rows, strict=True):
        of_one[:, 0] = image
    clock = PhaseClock(torch.device("cpu"))
    with clock.running():
        for _ in range(2):  # the first prepares the ground truth
            with phase(MAP, len(ids)):
                coco_stats(ground_truth, np.concatenate(rows), ids)
    return clock.seconds_each(MAP)


def waiting(reading: float, computing: float, workers: int) -> float:
    """Return the seconds that a run waits for an image, which `workers` processes read while it computes."""
    return max(0.0, reading / min(workers, cores()) - computing) if workers else reading


def cores() -> int:
    """Return the CPU cores that this process may use, its share with the run's other processes on the machine."""
    return max(1, usable_cores() // processes_here())


def shown_time(seconds: float) -> str:
    """Return a time in the unit that reads best."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gigabytes(number: float) -> str:
    """Return bytes as text."""
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def _each(seconds: float, count: float) -> str:
    return shown_time(seconds / count) if count else ""
