"""Plan an export: time the detector on a few images, and count the checks, the images of INT8 and the timings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets.config import DataConfig
from models.detector import Detector
from models.folding import folded_copy
from runs.plan import AT_MOST, RunPlan, Tally, gigabytes
from tools.export_check import filled_by_images
from tools.export_formats import HALF, GraphForm, runs_to_check
from tools.export_int8 import CALIBRATION_IMAGES, CPU, EVALUATED_IMAGES, TIMED_ROUNDS, first_images, most_trials
from tools.export_timing import has_openvino, one_thread
from util.files import free_disk
from util.memory import storage_bytes
from util.phases import CALIBRATION, CHECKS, EVALUATION, TIMINGS
from util.timing import seconds_side_by_side

INT8 = "int8"
SAMPLED_IMAGES = 3
UNITS = {CHECKS: "images", CALIBRATION: "images", EVALUATION: "images", TIMINGS: "turns"}
PRECISIONS = 3  # of which AP is measured besides the trials of INT8


@dataclass(frozen=True)
class PlannedExport:
    """What an export will do.

    Attributes:
        formats: of the files, without INT8.
        sizes_hw: heights and widths in pixels of the images to check.
        form: of the graphs.
        output_dir: folder of the files.
        calibrated_on: data set of INT8; None without INT8.
        in_float: groups of layers to leave in float32; None to find them.
        turns: of the timings; 0 for none.
        timed: the detectors to time.
    """

    formats: Sequence[str]
    sizes_hw: Sequence[tuple[int, int]]
    form: GraphForm
    output_dir: Path
    calibrated_on: DataConfig | None = None
    in_float: Sequence[str] | None = None
    turns: int = 0
    timed: Sequence[Detector] = ()


def plan_export(model: Detector, planned: PlannedExport) -> RunPlan:
    """Time the detector, in eval mode on the CPU, and return the plan.

    The runtimes are taken to be as fast as PyTorch. Tracing and writing the files is not estimated.
    """
    tally, runs = Tally(), sum(map(runs_to_check, planned.formats))
    form = planned.form
    images = sum(len(batch) for size in form.batch_sizes for batch in filled_by_images(size, form.with_mask))
    for size_hw in planned.sizes_hw:
        tally.add(CHECKS, runs * images, 2 * runs * images * _seconds(model, [torch.zeros(3, *size_hw)]))
    if planned.calibrated_on is not None:
        _add_int8(tally, model, planned.calibrated_on, planned.in_float)
    if planned.turns:
        runtimes, size = 2 + has_openvino(), form.batch_size or 1
        with one_thread():
            seconds = sum(
                _seconds(detector, [torch.zeros(3, *planned.sizes_hw[0])] * size) for detector in planned.timed
            )
        tally.add(TIMINGS, planned.turns, (planned.turns + 1) * runtimes * seconds)  # one turn warms up
    plan = RunPlan("plan of an export", tally.phases(UNITS), [*_facts(model, planned)])
    if planned.calibrated_on is None or planned.in_float is not None:
        return plan
    saved = plan.seconds_of(EVALUATION) * (1 - (PRECISIONS + 1) / (PRECISIONS + most_trials(None)))
    return plan.advised([("--int8_float GROUPS, where you know which layers need float32", saved)])


def _add_int8(tally: Tally, model: Detector, data: DataConfig, in_float: Sequence[str] | None) -> None:
    """Add calibration and AP, timed on a few images of val2017."""
    sampled = [image for images, _ in first_images("val2017", data, SAMPLED_IMAGES) for image in images]
    seconds = sum(_seconds(model, [image]) for image in sampled) / len(sampled)
    calibrated, evaluated = (
        len(first_images(split, data, count).given)
        for split, count in (("train2017", CALIBRATION_IMAGES), ("val2017", EVALUATED_IMAGES))
    )
    tally.add(CALIBRATION, calibrated, calibrated * seconds)
    evaluated *= PRECISIONS + most_trials(in_float)
    bound, timed = (AT_MOST, PRECISIONS + 2) if in_float is None else ("", PRECISIONS + 1)
    tally.add(EVALUATION, evaluated, evaluated * seconds, bound)
    with one_thread():
        tally.add(TIMINGS, TIMED_ROUNDS, (TIMED_ROUNDS + 1) * timed * _seconds(model, sampled[:1]))


def _facts(model: Detector, planned: PlannedExport) -> Iterator[str]:
    """Say what the files will take, by the parameters, and what the plan leaves out."""
    folded = folded_copy(model)
    tensors = [*folded.parameters(), *folded.buffers()]
    whole = storage_bytes(tensors)
    sizes = {name: whole / 2 if name == HALF else whole for name in planned.formats}
    if planned.calibrated_on is not None:
        # Weights in 8 bits, biases and norms in 32.
        weights = storage_bytes(tensor for tensor in tensors if tensor.dim() > 1)
        sizes[INT8] = whole - 0.75 * weights
    named = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items())
    free, needed = free_disk(planned.output_dir), sum(sizes.values())
    fit = "they fit" if needed <= free else "they do not fit"
    more = ", INT8 more with --int8_float" if INT8 in sizes else ""
    yield f"files take about: {named}{more}; {gigabytes(free)} are free for {planned.output_dir}: {fit}"
    yield "not estimated: tracing the detector and writing the files"


@torch.no_grad()
def _seconds(model: Detector, images: list[Tensor]) -> float:
    """Return the seconds of one call, after one that warms up."""
    (seconds,) = seconds_side_by_side({"": functools.partial(model, images)}, CPU, rounds=1)[""]
    return seconds
