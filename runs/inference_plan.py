"""Plan an inference: detect and draw on a few images, without writing them, and count the others."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator

import numpy as np

import engine
from models.folding import folded_copy
from runs.plan import AT_MOST, RunPlan, Tally, cores, gigabytes, waiting
from tools.draw import FORMATS
from tools.image_files import Sample
from tools.prediction import Prediction, calls_to_time
from util.errors import UserError
from util.files import free_disk
from util.memory import USABLE_SHARE, PeakMemory, free_bytes
from util.phases import DETECTION, DRAWING, READING, TIMINGS, PhaseClock, phase

SAMPLED_IMAGES = 8
LONG = 32  # times the sample, from which on a run plans itself
UNITS = {READING: "images", TIMINGS: "images", DETECTION: "images", DRAWING: "images"}


def is_long_inference(prediction: Prediction) -> bool:
    """Return whether a run is long enough for the sample to be a small part of it."""
    return len(prediction.paths) >= LONG * sampled_images(prediction)


def sampled_images(prediction: Prediction) -> int:
    """Return the number of images to time: two batches or more, of which the first warms up."""
    return max(SAMPLED_IMAGES, 2 * prediction.loader.batch_size)


class InferencePlanner:
    """Plans one run of inference.py, which stays as it is."""

    def __init__(self, prediction: Prediction) -> None:
        """Measure nothing yet."""
        self._prediction = prediction
        self._clock = PhaseClock(prediction.device, waits=True)
        # With detections of their own.
        self._detectors = [
            dataclasses.replace(detector, model=folded_copy(detector.model), rows=[], drawn=Counter())
            for detector in prediction.detectors
        ]
        self._are_all_readable = True
        self._bytes_of_pictures = self._batch_bytes = 0

    def plan(self) -> RunPlan:
        """Time the sample and return the plan.

        Raises:
            UserError: no image can be read.
        """
        with self._clock.running():
            sampled = sum(map(self._time, self._batches()))
        if not sampled:
            raise UserError(
                f"found no image that can be read among {len(self._prediction.paths)}, expected at least one"
            )
        clock, tally, images = self._clock, Tally(), len(self._prediction.paths)
        bound = "" if self._are_all_readable else AT_MOST
        tally.add(READING, images, images * self._waiting(self._prediction.loader.num_workers))
        if len(self._detectors) > 1:
            calls = calls_to_time(images)
            tally.add(TIMINGS, calls, calls * clock.seconds_each(DETECTION), bound)
        for name in (DETECTION, DRAWING):
            tally.add(name, images, images * clock.seconds_each(name), bound)
        plan = RunPlan(f"plan of an inference on {images:,} images", tally.phases(UNITS), self._facts(sampled))
        return plan.advised([*self._changes()])

    def _batches(self) -> Iterator[list[Sample]]:
        """Yield batches of images that can be read, from anywhere in the list."""
        prediction = self._prediction
        wanted, batch = sampled_images(prediction), list[Sample]()
        for place in np.random.default_rng(0).permutation(len(prediction.paths)).tolist():
            with phase(READING, 1):
                sample = prediction.dataset[place]
            self._are_all_readable &= not sample.problem
            if not sample.problem:
                batch.append(sample)
                wanted -= 1
            if len(batch) == prediction.loader.batch_size or (batch and not wanted):
                yield batch
                batch = []
            if not wanted:
                return
        if batch:
            yield batch

    def _time(self, batch: list[Sample]) -> int:
        """Detect and draw on a batch; return the number of its images."""
        prediction, is_first = self._prediction, not self._bytes_of_pictures
        memory = PeakMemory()
        counted: contextlib.AbstractContextManager = memory if is_first else contextlib.nullcontext()
        with counted, phase(DETECTION, len(batch)):
            results = [prediction.detect(detector, batch) for detector in self._detectors]
        self._batch_bytes = max(self._batch_bytes, memory.peak_bytes)
        captions = [str(detector.path) for detector in self._detectors]
        for sample, *found in zip(batch, *results, strict=True):
            with phase(DRAWING, 1):
                stream = io.BytesIO()
                prediction.picture(sample, found, captions).save(stream, **FORMATS[".jpg"])
            self._bytes_of_pictures += len(stream.getvalue())
        return len(batch)

    def _facts(self, sampled: int) -> list[str]:
        """Say what files and a batch take, from the `sampled` images."""
        prediction = self._prediction
        share, device = len(prediction.paths) / sampled, prediction.device
        entries = (engine.to_coco_results(np.concatenate(detector.rows)) for detector in self._detectors)
        pictures, results = share * self._bytes_of_pictures, share * sum(len(json.dumps(found)) for found in entries)
        room, free = free_disk(prediction.output_dir), free_bytes(device)
        fit = "they fit" if pictures + results <= room else "they do not fit"
        fits = "fits" if self._batch_bytes <= USABLE_SHARE * free else "does not fit"
        return [
            f"pictures take about {gigabytes(pictures)} and results {gigabytes(results)} in {prediction.output_dir}, "
            f"with {gigabytes(room)} free: {fit}",
            f"a batch of {prediction.loader.batch_size} images takes about {gigabytes(self._batch_bytes)} besides the "
            f"weights, of {gigabytes(free)} free on {device}: it {fits} (a fifth stays unused)",
        ]

    def _waiting(self, workers: int) -> float:
        """Return the seconds that the run waits for an image."""
        clock = self._clock
        computing = clock.seconds_each(DETECTION) + clock.seconds_each(DRAWING)
        return waiting(clock.seconds_each(READING), computing, workers)

    def _changes(self) -> Iterator[tuple[str, float]]:
        """Yield options that would change the plan, and the seconds that they would save by its figures."""
        images, workers = len(self._prediction.paths), self._prediction.loader.num_workers
        for more in (2, 4, 8, 16):
            if workers < more <= cores():
                yield f"--num_workers {more}", images * (self._waiting(workers) - self._waiting(more))
