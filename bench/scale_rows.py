"""Seconds of the phases of a measured run, and those that a data set of COCO's size would take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bench.watched_run import WatchedRun
from runs.search_plan import UNITS
from util.phases import BACKBONE, FITS, GRADIENTS, MAP, MOMENTS, READING, TRANSFORMER

FULL_IMAGES = 5000
START = "start and first step"
BY_IMAGES, BY_CALIBRATION = "per image", "per calibration image"
BY_BOTH = "evaluations per image, the rest per calibration image"
ONCE = "taken as measured"
# What a phase of a search grows with.
RULES = {
    READING: BY_IMAGES,
    BACKBONE: BY_IMAGES,
    MAP: BY_IMAGES,
    GRADIENTS: BY_CALIBRATION,
    MOMENTS: BY_CALIBRATION,
    TRANSFORMER: BY_BOTH,
    FITS: ONCE,
}


def row(phase: str, measured_on: str, seconds: float, rule: str, factor: float, images: int) -> dict[str, Any]:
    """Return a row of a run on so many images; `factor` times its seconds are those for `FULL_IMAGES` images."""
    how = ONCE if rule == ONCE else f"extrapolated {rule}, x {factor:,.1f}"
    return {
        "phase": phase,
        "measured_on": measured_on,
        "seconds": round(seconds, 3),
        "full_seconds": round(seconds * factor, 1),
        "how": "measured" if images == FULL_IMAGES or (factor == 1 and rule != ONCE) else how,
    }


def search_rows(
    seconds: float,
    phases: Sequence[Mapping[str, Any]],
    *,
    trials: int,
    images: int,
    calibration_images: int,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Return the rows of a search that ran on the first `images` images and calibrated on as many, if not more.

    Args:
        seconds: of the whole run.
        phases: as the journal's last line has them.
        trials: detectors that were cut and evaluated.
        calibration_images: of a search on many images.
        labels: names to show in place of those of phases.
    """
    calibrated = min(images, calibration_images)
    by_images, by_calibration = FULL_IMAGES / images, min(FULL_IMAGES, calibration_images) / calibrated
    rows = []
    for phase in phases:
        name, count = phase["phase"], phase["done"]
        rule = RULES[name]
        # mAP before the search and after each cut; a pass of the transformer counts as its share of a whole one.
        evaluated = min((trials + 1) * images / count, 1.0) if count else 1.0
        factor = {
            BY_IMAGES: by_images,
            BY_CALIBRATION: by_calibration,
            BY_BOTH: evaluated * by_images + (1 - evaluated) * by_calibration,
            ONCE: 1.0,
        }[rule]
        rows.append(row(labels.get(name, name), f"{count:,.0f} {UNITS[name]}", phase["seconds"], rule, factor, images))
    rest = seconds - sum(phase["seconds"] for phase in phases)
    return [*rows, row("the rest", "", max(0.0, rest), ONCE, 1.0, images)]


def training_rows(run: WatchedRun, steps: int, batch_size: int, images: int) -> list[dict[str, Any]]:
    """Return the rows of an epoch of `steps` steps, evaluated on `images` images."""
    found = {stage.name: stage.seconds for stage in run.stages}
    later = [found[f"step {number}"] for number in range(2, steps + 1)]
    left = math.ceil(FULL_IMAGES / batch_size) - 1
    return [
        row(START, "1 step", found["start, step 1"], ONCE, 1.0, 0),
        row(
            f"further steps of {batch_size} images", f"{len(later)} steps", sum(later), "per step", left / len(later), 0
        ),
        row("evaluation", f"{images} images", found["evaluation"], BY_IMAGES, FULL_IMAGES / images, images),
        row("writing", "", found.get("writing", 0.0), ONCE, 1.0, 0),
    ]


def total_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of rows."""
    seconds, full = (sum(row[name] for row in rows) for name in ("seconds", "full_seconds"))
    return {
        "phase": "total", "measured_on": "", "seconds": round(seconds, 3), "full_seconds": round(full, 1), "how": "",
    }  # fmt: skip
