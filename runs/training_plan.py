"""Plan a training or an evaluation: time a few batches on a copy of the detector, and count epochs and images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import torch

import engine
from datasets.coco import CocoLoader, build_loader
from runs.config import TrainingConfig, TrainingOptions
from runs.plan import (
    AT_MOST,
    RunPlan,
    Tally,
    cores,
    generators_kept,
    gigabytes,
    seconds_of_map,
    shown_time,
    waiting,
)
from runs.sampled_batches import Pace, SampledBatches
from runs.training_run import Run, train_epoch
from runs.training_state import TrainingState
from util import distributed
from util.memory import USABLE_SHARE, PeakMemory, available_ram, free_bytes, processes_here
from util.phases import EVALUATION, MAP, READING, TRAINING, PhaseClock, phase

SAMPLED_BATCHES = 3
DECODED_IMAGES = 16
LONG = 96  # batches from which on a run plans itself
UNITS = {READING: "images", TRAINING: "images", EVALUATION: "images", MAP: "images"}


def is_long_run(run: Run) -> bool:
    """Return whether a run is long enough for the sample to be a small part of it."""
    return (len(run.val_loader) if run.options.run.eval else epochs_left(run) * len(run.train_loader)) >= LONG


def epochs_left(run: Run) -> int:
    """Return the epochs that a training still has."""
    return run.options.training.epochs - run.state.epoch


def evaluations(run: Run, compares: bool, training: TrainingConfig | None = None) -> int:
    """Return how often a run evaluates; `compares` says whether a training does so before it begins."""
    if run.options.run.eval:
        return 1
    training, begun = training or run.options.training, run.state.epoch
    ends = sum(
        epoch % training.eval_every == 0 or epoch == training.epochs for epoch in range(begun + 1, training.epochs + 1)
    )
    teachers = int(run.comparison.teacher is not None)
    return ends + (1 + teachers if compares else 0)


class TrainingPlanner:
    """Plans one run of main.py. All processes plan alike; detector and random generators stay as they are."""

    def __init__(self, run: Run, compares: bool) -> None:
        """Measure nothing yet; `compares` is that of `evaluations`."""
        self._run, self._compares, self._options = run, compares, run.options
        self._training, self._testing = Pace(), Pace()
        self._step_bytes = 0

    def plan(self) -> RunPlan:
        """Time the sample and return the plan; the sample's memory is free again."""
        try:
            return self._plan()
        finally:
            free_sample()

    def _plan(self) -> RunPlan:
        run = self._run
        with generators_kept():
            if not self._options.run.eval:
                self._train()
            self._test()
            self._time_decoding()
        options, tally = self._options, Tally()
        bound = AT_MOST if options.training.patience and not options.run.eval else ""
        self._trained = 0 if options.run.eval else epochs_left(run) * images_of(run.train_loader)
        self._tested = evaluations(run, self._compares) * images_of(run.val_loader)
        tally.add(READING, self._trained + self._tested, self._waiting(options.data.num_workers), bound)
        tally.add(TRAINING, self._trained, self._trained * self._training.computing, bound)
        tally.add(EVALUATION, self._tested, self._tested * self._testing.computing, bound)
        layers = options.detector.dec_layers if options.run.ap_by_layer else 1
        measured = evaluations(run, self._compares) * layers * len(run.val_dataset)
        tally.add(MAP, measured, measured * self._map_each, bound)
        plan = RunPlan(self._title, tally.phases(UNITS), self._facts())
        return plan.advised([*self._changes(plan)])

    def _time_decoding(self) -> None:
        """Time the decoding of a few training images, which --cache_images does once."""
        run = self._run
        self._decoding_each = self._decoding = 0.0
        if self._options.run.eval:
            return
        dataset = run.train_loader.coco
        sizes = range(0, len(dataset), max(1, len(dataset) // DECODED_IMAGES))
        clock = PhaseClock(torch.device("cpu"))
        with clock.running(), phase(READING, len(sizes)):
            for index in sizes:
                dataset.picture(index)
        self._decoding_each = clock.seconds_each(READING)
        self._decoding = self._decoding_each * (len(dataset) + len(run.val_dataset)) / cores()

    def _train(self) -> None:
        """Train a copy of the detector for a few batches, after one that measures memory."""
        run, options, memory = self._run, self._options, PeakMemory()
        self._train_on(spread(run.train_loader.coco, options.data.batch_size, run.device, batches=1), options, memory)
        self._step_bytes = memory.peak_bytes
        self._training = self._pace_of_training(options)

    def _pace_of_training(self, options: TrainingOptions) -> Pace:
        """Train a copy of the detector for a few batches."""
        run = self._run
        loader = spread(run.train_loader.coco, options.data.batch_size, run.device)
        steps_each = run.state.steps_per_epoch / len(run.train_loader)
        batches = SampledBatches(loader, TRAINING, run.device, steps_each)
        self._train_on(batches, options.with_values({"accumulate": batches.accumulate}))
        return batches.pace

    def _train_on(
        self,
        batches: CocoLoader | SampledBatches,
        options: TrainingOptions,
        memory: contextlib.AbstractContextManager | None = None,
    ) -> None:
        """Train a copy of the detector on `batches`; `memory` counts what that takes besides what a run has anyway.

        The teacher's weights in 16 bits are freed, too: the run may not need them.
        """
        run = self._run
        model = copy.deepcopy(run.model)
        state = TrainingState(model, options.training, run.state.steps_per_epoch, amp=options.run.amp)
        state.optimizer.load_state_dict(copy.deepcopy(run.state.optimizer.state_dict()))  # of a resumed run
        wrapped = run.wrap(model)
        teaching = run.distillation
        try:
            with memory or contextlib.nullcontext():
                train_epoch(options, wrapped, run.criterion, batches, state, teaching, run.device, progress=False)
        finally:
            if teaching is not None:
                teaching.free_converted()
        del model, state, wrapped
        free_sample()

    def _test(self) -> None:
        """Evaluate a few batches."""
        run, options = self._run, self._options
        loader = spread(run.val_loader.given, options.data.batch_size, run.device)
        batches = SampledBatches(loader, EVALUATION, run.device)
        result = engine.evaluate(
            run.model, run.postprocess, batches, run.ground_truth, device=run.device,
            criterion=None if options.run.eval else run.criterion, amp=options.run.eval_amp, progress=False,
            by_layer=options.run.ap_by_layer,
        )  # fmt: skip
        self._testing = batches.pace
        self._map_each = seconds_of_map(run.ground_truth, run.val_dataset.ids, result)

    @property
    def _title(self) -> str:
        run, processes = self._run, distributed.world_size()
        each = f", on each of {processes} processes" if processes > 1 else ""
        if self._options.run.eval:
            return f"plan of an evaluation of {len(run.val_dataset):,} images{each}"
        return (
            f"plan of {epochs_left(run)} epochs of {run.state.steps_per_epoch:,} optimizer steps on "
            f"{images_of(run.train_loader):,} images{each}"
        )

    def _facts(self) -> list[str]:
        run, size = self._run, self._options.data.batch_size
        if self._options.run.eval:
            return []
        seconds = images_of(run.train_loader) * self._each(self._training)
        tested = images_of(run.val_loader) * self._each(self._testing) + len(run.val_dataset) * self._map_each
        free, needed = free_bytes(run.device), self._step_bytes
        fits = "fits" if needed <= USABLE_SHARE * free else "does not fit"
        facts = [
            f"an epoch takes about {shown_time(seconds)}, and each evaluation {shown_time(tested)}",
            f"a step on {size} images takes at most about {gigabytes(needed)} besides the weights, of "
            f"{gigabytes(free)} free on {run.device}: it {fits} (a fifth stays unused)",
        ]
        if self._options.training.cache_images:
            facts.append(f"--cache_images decodes the images once, in about {shown_time(self._decoding)}")
        return facts

    def _each(self, pace: Pace) -> float:
        """Return the seconds for an image, with what the run waits for it."""
        return pace.computing + waiting(self._reading(pace), pace.computing, self._options.data.num_workers)

    def _changes(self, plan: RunPlan) -> Iterator[tuple[str, float]]:
        """Yield options that would change the plan, and the seconds that they would save by its figures."""
        yield from self._other_reading(plan)
        run, training = self._run, self._options.training
        if self._options.run.eval:
            return
        testing = plan.seconds - self._trained * self._each(self._training)
        for every in (2, 5):
            if training.eval_every < every <= training.epochs:
                fewer = dataclasses.replace(training, eval_every=every)
                left = evaluations(run, self._compares, fewer) / evaluations(run, self._compares)
                yield f"--eval_every {every}", testing * (1 - left)
        if run.device.type == "cuda":
            if self._options.run.amp == "off":
                with generators_kept():
                    faster = self._pace_of_training(self._options.with_values({"amp": "bf16"}))
                yield "--amp", self._trained * (self._each(self._training) - self._each(faster))
            if torch.cuda.device_count() > distributed.world_size():
                count = torch.cuda.device_count()
                yield f"torchrun --nproc_per_node {count}", plan.seconds * (1 - distributed.world_size() / count)

    def _other_reading(self, plan: RunPlan) -> Iterator[tuple[str, float]]:
        workers = self._options.data.num_workers
        for more in (2, 4, 8, 16):
            if workers < more <= cores():
                yield f"--num_workers {more}", plan.seconds_of(READING) - self._waiting(more)
        if self._options.run.eval or self._options.training.cache_images:
            return
        needed, free = self._run.cached_bytes(), USABLE_SHARE * available_ram() / processes_here()
        if needed < free:
            saved = plan.seconds_of(READING) - self._waiting(workers, self._decoding_each) - self._decoding
            yield f"--cache_images, which takes {gigabytes(needed)} of RAM", saved

    def _waiting(self, workers: int, saved_each: float = 0.0) -> float:
        """Return the seconds that the whole run waits for images; `saved_each` is saved in reading one."""
        return sum(
            images * waiting(max(0.0, self._reading(pace) - saved_each), pace.computing, workers)
            for images, pace in ((self._trained, self._training), (self._tested, self._testing))
        )

    def _reading(self, pace: Pace) -> float:
        """Return the seconds that one core takes to read an image; with --cache_images it is decoded already."""
        is_decoded = not self._options.run.eval and self._options.training.cache_images
        return max(0.0, pace.reading - self._decoding_each) if is_decoded else pace.reading


def free_sample() -> None:
    """Free what a sample took. A training state refers to itself, so only the garbage collector frees it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def spread(dataset: Any, batch_size: int, device: torch.device, batches: int = SAMPLED_BATCHES) -> CocoLoader:
    """Return a loader of a few batches of neighbours, evenly spread over a `CocoDataset` or a Subset of one."""
    size = len(dataset)
    batches = min(batches, -(-size // batch_size))
    starts = [size * number // batches for number in range(batches)]
    return build_loader(dataset, [range(at, min(at + batch_size, size)) for at in starts], shuffle=False, device=device)


def images_of(loader: CocoLoader) -> int:
    """Return the images of a pass in one process."""
    return len(loader.sampler)  # type: ignore[arg-type]
