"""Tables and sentences of docs/results.md about a data set of COCO's size and about growth, for `bench.pages`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.coco_scale import RESULT_NAME, TRAINING
from bench.coco_set import CATEGORIES, HEIGHT, WIDTH
from bench.growth import IMAGES, LAYERS, NAME, PIXELS, PROCESSES, line_through, values
from bench.scale_rows import FULL_IMAGES, total_row
from bench.sentences import measured_with, paragraph
from bench.tables import markdown, read_figures
from util.phases import BACKBONE

STRAIGHT = 0.05  # greatest distance from a line of what counts as straight, as a share of the largest value


def coco_scale(results: Path) -> str:
    """List the phases of a fast search and of a training, as measured and for a data set of COCO's size."""
    rows = []
    for name, run in read_figures(results, RESULT_NAME)["runs"].items():
        for row in (*run["rows"], total_row(run["rows"])):
            is_total = row["phase"] == "total"
            title = f"**{name}, {row['phase']}**" if is_total else f"{name}, {row['phase']}"
            rows.append(
                (title, row["measured_on"], f"{row['seconds']:,.1f}", duration(row["full_seconds"]), row["how"])
            )
    return markdown(("", "measured on", "seconds", f"{FULL_IMAGES:,} images", "how"), rows)


def coco_scale_memory(results: Path) -> str:
    """List seconds and peak memory of the stages of the same runs."""
    rows = [
        (
            f"{name}, {stage['name']}", f"{stage['seconds']:,.1f}", f"{stage['cpu_seconds']:,.1f}",
            f"{stage['peak_bytes'] / 1e9:.2f}",
        )
        for name, run in read_figures(results, RESULT_NAME)["runs"].items()
        for stage in run["stages"]
    ]  # fmt: skip
    return markdown(("as measured", "seconds", "CPU seconds", "GB at most"), rows)


def duration(seconds: float) -> str:
    """Return a time in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def scale_text(results: Path) -> str:
    """Describe the measurement."""
    found = read_figures(results, RESULT_NAME)
    settings, runs = found["settings"], found["runs"]
    budgets = " ".join(f"{keep:g}" for keep in settings["keep"])
    features = "; ".join(
        f"{name}: {run['features_megabytes'] / 1000 * FULL_IMAGES / settings['images']:.0f} GB"
        for name, run in runs.items()
        if "features_megabytes" in run
    )
    steps = f", training steps: {settings['steps']}" if TRAINING in runs else ""
    cpu, wall = (
        sum(stage[key] for run in runs.values() for stage in run["stages"]) for key in ("cpu_seconds", "seconds")
    )
    weights = " (random weights)" if settings["weights"] == "random" else ""
    return paragraph(
        f"{FULL_IMAGES:,} JPEGs of {HEIGHT} x {WIDTH} pixels with COCO's {len(CATEGORIES)} categories, of which "
        f"{settings['images']:,} were used; DN-DETR-R50{weights}, short side {settings['image_size']}, batches of "
        f"{settings['batch_size']}, `--keep {budgets}`{steps}. With an mAP of 0 before "
        "the search only one power is tried; otherwise the first budget takes two cuts more. The last column "
        f"says how the seconds for {FULL_IMAGES:,} images follow from the measured ones. They suppose that the "
        f"cached features fit in memory, which for so many images take: {features}. Other work ran beside: the "
        f"process had {cpu:.0f} CPU seconds in {wall:.0f} seconds. {measured_with(found)}"
    )


def bend(points: Sequence[Mapping[str, Any]]) -> str:
    """Say of a series that is not straight at which point, and in which phase, it is farthest from a line.

    Other work can slow the machine down, which shows in phases that do the same work in each run of the series.
    """
    name = points[0]["series"]
    worst = max(points, key=lambda point: abs(off_line(points, point, lambda p: values(p, "seconds")[1])))
    phases = {
        phase: off_line(points, worst, lambda p, phase=phase: p["phases"].get(phase, 0.0)) for phase in worst["phases"]
    }
    phase = max(phases, key=lambda phase: abs(phases[phase]))
    off = off_line(points, worst, lambda p: values(p, "seconds")[1])
    text = f" (farthest at {worst['value']:,}: {off:+.1f} s, of which {phases[phase]:+.1f} s in the phase {phase}"
    if name != LAYERS:
        return f"{text})"
    same = [point["phases"][BACKBONE] for point in points]
    return f"{text}; the backbone, with the same work in each run, took {min(same):.1f} to {max(same):.1f} s)"


def off_line(
    points: Sequence[Mapping[str, Any]], point: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float]
) -> float:
    """Return by how much the value of a point is above the line through those of all."""
    x = [values(one, "seconds")[0] for one in points]
    slope, constant = np.polyfit(x, [value(one) for one in points], 1)
    return float(value(point) - constant - slope * values(point, "seconds")[0])


def bound_in_percent(bound: float) -> str:
    """Return the least whole percent that a fraction is within."""
    return f"{math.ceil(round(100 * bound, 6))} %"


def growth_text(results: Path) -> str:
    """Report how close the growth is to straight lines, and where it is not what is farthest from one."""
    found = read_figures(results, f"{NAME}.json")
    parts, settings = [], found["settings"]
    for name, unit, times in (
        (IMAGES, "1,000 images", 1000), (PIXELS, "10,000 pixels", 10_000), (LAYERS, "layer", 1),
        (PROCESSES, "share of the work", 1),
    ):  # fmt: skip
        points = [point for point in found["points"] if point["series"] == name]
        if len(points) < 3:
            continue
        constant, slope, distance = line_through(points, "seconds")
        memory, more, off = line_through(points, "gigabytes")
        parts.append(
            f"{name}: {constant:.1f} s and {slope * times:.1f} s for each {unit}, within {bound_in_percent(distance)}; "
            f"memory {memory:.2f} GB and {more * times:.3f} GB for each, within {bound_in_percent(off)}"
            f"{bend(points) if distance > STRAIGHT else ''}"
        )
    return paragraph(
        f"{settings['few_images']} images, short side {settings['image_size']}, where these are not varied. Lines "
        f"through the CPU seconds and the peak memory, and the largest distance of a measured point from them. "
        f"{'. '.join(part[0].upper() + part[1:] for part in parts)}. {measured_with(found)}"
    )


SCALE_TABLES: Mapping[str, Callable[[Path], str]] = {
    "coco_scale": coco_scale,
    "coco_scale_memory": coco_scale_memory,
}
SCALE_TEXTS: Mapping[str, Callable[[Path], str]] = {"coco_scale": scale_text, "growth": growth_text}
