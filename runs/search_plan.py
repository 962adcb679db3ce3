"""Plan a search: time a few batches and one module of each kind, and count what the whole search has to do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from datasets.annotations import load_annotations
from datasets.coco import split_of
from models.residual import BLOCK
from pruning.cache_plan import Storage
from pruning.cost_tables import widths_of
from pruning.divided_fits import fit_everywhere
from pruning.gates import clear_gates
from pruning.journal import Decision, Journal, Layers, Trial, Turn, read_events
from pruning.kept_channels import Kept, none_kept
from pruning.latency import Measurement
from pruning.latency_table import Setting
from pruning.schedule import Schedule
from pruning.search import Units
from pruning.workbench import DetectorBench, SearchImages
from reports.samples import COMPARED_IMAGES, SPLIT
from runs.depth_search import fewer_layers
from runs.plan import (
    ABOUT,
    AT_MOST,
    RunPlan,
    Snapshot,
    Tally,
    cores,
    generators_kept,
    gigabytes,
    seconds_of_map,
    shown_time,
    spent_in,
    waiting,
)
from runs.search_counts import Images, Rates, SampledModule, SearchTally, group_of
from runs.search_facts import ADDED, UNREAD
from runs.search_setup import SearchSetup
from util import distributed
from util.memory import processes_here
from util.phases import (
    BACKBONE,
    FITS,
    GRADIENTS,
    LATENCIES,
    MAP,
    MOMENTS,
    READING,
    SCORES,
    TRANSFORMER,
    PhaseClock,
)

SAMPLED_BATCHES = 3  # of each process
LONG = 24  # batches of each process from which on a search plans itself
CALIBRATED_BATCHES = 2
TYPICAL = 0.63  # of a module's width: the cube root of the mean of the cubes of all widths, as fits take that time
UNITS = {
    READING: "images", BACKBONE: "images", TRANSFORMER: "images", GRADIENTS: "images", MOMENTS: "images",
    FITS: "fits", SCORES: "channels", MAP: "images", LATENCIES: "turns",
}  # fmt: skip
OF_DETECTOR = {BACKBONE: "stem", TRANSFORMER: "blocks and transformer"}


@dataclass(frozen=True)
class Past:
    """What the journal of a resumed search holds."""

    trials: Sequence[Trial] = ()
    decisions: Sequence[Decision] = ()
    turns: Sequence[Turn] = ()
    layers: Sequence[Layers] = ()


def read_past(journal: Journal, facts_of: Callable[[float, bool], Mapping[str, Any]]) -> Past:
    """Return what a search did before it is resumed, and check its journal as far as that needs no evaluation.

    Args:
        facts_of: maps mAP before the search, and whether cached features are in bfloat16, to the facts of the search.

    Raises:
        UserError: the journal belongs to another search or cannot be read.
    """

    def read() -> list[dict[str, Any]]:
        if not journal.path.exists():
            return []
        start, *lines = journal.read()[0] or [{}]
        args, base_ap = start.get("args"), start.get("base_ap")
        is_halved = isinstance(args, dict) and args.get("cache_dtype") == "bfloat16"
        journal.check(facts_of(base_ap if isinstance(base_ap, float) else 0.0, is_halved), UNREAD, ADDED)
        return lines

    lines = distributed.on_main(read)
    return Past(
        read_events(lines, "trial", Trial, journal.path),
        read_events(lines, "decision", Decision, journal.path),
        read_events(lines, "latency", Turn, journal.path),
        read_events(lines, "layers", Layers, journal.path),
    )


def is_long_search(setup: SearchSetup) -> bool:
    """Return whether a search is long enough for the sample to be a small part of it."""
    return setup.num_images >= LONG * setup.options.data.batch_size * distributed.world_size()


class SearchPlanner:
    """Plans one search. All processes plan alike; the model, its gates and all random generators stay as they are."""

    def __init__(self, setup: SearchSetup, schedule: Schedule, units: Units, past: Past) -> None:
        """Measure nothing yet."""
        self._setup, self._schedule, self._units, self._past = setup, schedule, units, past
        self._config, self._options = setup.options.search, setup.options
        self._images, self._shapes = setup.all_images()
        self._clock = PhaseClock(setup.device, waits=True)

    def plan(self) -> RunPlan:
        """Time the sample and return the plan.

        Raises:
            UserError: as the search, if images cannot be read or memory is too small.
        """
        with generators_kept(), self._clock.running():
            bench, images = self._sampled_bench()
            costs = self._costs(bench, images)
            bench.reset()
            ids = self._setup.dataset.ids[: self._setup.num_images]
            self._map_each = seconds_of_map(self._setup.ground_truth, ids, bench.evaluate())
            tally = self._tally(bench, costs)
            self._add_latencies(tally)
        clear_gates(self._setup.model)
        is_detector = self._config.scope == "detector"
        plan = RunPlan(self._title, tally.phases(UNITS), self._facts(), labels=OF_DETECTOR if is_detector else {})
        return plan.advised([*self._changes(plan)])

    def _sampled_bench(self) -> tuple[DetectorBench, SearchImages]:
        """Return a bench over the first batches, in whose first batch the memory of the whole search is planned."""
        setup, in_each = self._setup, self._options.data.batch_size * distributed.world_size()
        self._planner = setup.planner(self._shapes, *self._images.kept_and_calibrated(self._config.method))
        calibrated = min(self._images.calibration_batches, CALIBRATED_BATCHES * distributed.world_size())
        images, _ = setup.images(min(setup.num_images, SAMPLED_BATCHES * in_each), calibrated, num_workers=0)
        drawn_over = min(self._images.calibration_batches * self._options.data.batch_size, setup.num_images)
        images = dataclasses.replace(images, drawn_over=drawn_over)

        def plan(features: Any, front_bytes: int) -> Storage:
            self._storage = self._planner.choose(features, front_bytes)
            return Storage(self._storage.device, self._storage.dtype)

        return setup.bench(images, plan), images

    def _costs(self, bench: DetectorBench, images: SearchImages) -> dict[str, SampledModule]:
        """Time one module of each group, the middle one in network order."""
        groups: dict[str, list[str]] = {}
        for name in bench.modules:
            groups.setdefault(group_of(name), []).append(name)
        chosen = [names[len(names) // 2] for names in groups.values()]
        calibrated = images.kept_and_calibrated(self._config.method)[1]
        sampled = sum(len(bench.cache.targets[batch]) for batch in calibrated)
        if self._config.method.search == "grow":
            module = bench.modules[chosen[0]]
            candidates = torch.arange(min(module.width, 2 * self._config.images_at_once))
            bench.begin(module.name)
            bench.ranking(module, module.parts, none_kept(module), candidates)
            return {group_of(name): SampledModule(name, 1, sampled) for name in chosen}
        bench.reset()
        found, kept = {}, {}
        for name in chosen:
            found[name], kept[name] = self._cost(bench, name, sampled)
        if self._config.method.search == "global":
            bench.reset()
            first = next(iter(bench.modules))
            if bench.modules[first].kind == BLOCK and first not in chosen and (widths := self._widths(bench, first)):
                bench.begin(first)  # fits of blocks after a pruned one do more
                bench.set_kept(first, bench.rank(first).kept(widths[0]))
            for name in chosen:
                bench.begin(name)
                cut = spent_in(self._clock, functools.partial(bench.set_kept, name, kept[name]))
                found[name] = dataclasses.replace(found[name], cut=cut)
        return {group_of(name): cost for name, cost in found.items()}

    def _cost(self, bench: DetectorBench, name: str, images: int) -> tuple[SampledModule, Kept]:
        """Time the ranking of a module and two of its widths; return a kept set, too."""
        module, widths = bench.modules[name], self._widths(bench, name)
        bench.begin(name)
        above = [width for width in widths if width] or [module.width]
        place = int(TYPICAL * len(above))
        if not module.is_attention and self._config.method.search == "global":  # one process fits all widths at once
            fits, found = [], []
            measured = spent_in(self._clock, lambda: fits.append(bench.predict(name, widths)))
            fitted = spent_in(self._clock, lambda: found.append(fit_everywhere(fits[0], len(widths))))
            return SampledModule(name, module.width, images, measured, fitted), found[0][0].kept(above[place])
        orders = []
        rank = spent_in(self._clock, lambda: orders.append(bench.rank(name)))
        (order,) = orders
        kept = order.kept(above[place])
        pair = above[place], above[max(0, place - 1)]

        def try_width(width: int) -> Snapshot:
            if self._config.method.search == "global":
                return spent_in(self._clock, lambda: bench.damages(name, order, [width]))
            return spent_in(self._clock, lambda: bench.set_kept(name, order.kept(width)))

        first, more = try_width(pair[0]), try_width(pair[1])
        removed = try_width(0) if self._units.min_units == 0 else {}
        return SampledModule(name, module.width, images, rank, first, more, removed, first), kept

    def _widths(self, bench: DetectorBench, name: str) -> list[int]:
        """Return the widths of a module that the search may try, without the whole one."""
        unit, module = self._units.channels(bench.modules[name]), bench.modules[name]
        return list(range(self._units.min_units * unit, module.width, unit))

    def _tally(self, bench: DetectorBench, costs: Mapping[str, SampledModule]) -> SearchTally:
        clock, shapes, images = self._clock, self._shapes, self._images
        own, calibrated = images.own(), images.kept_and_calibrated(self._config.method)[1]

        def count(batches: Sequence[int]) -> int:
            return sum(shapes[batch].images for batch in batches)

        cached = int(count(own) * self._cached_share)
        self._counts = Images(
            read=count(range(len(shapes))),
            own=count(own),
            calibrated=count(calibrated),
            first_batch=count([place for place, number in enumerate(images.numbers) if number == 0]),
            subset_attention=count(images.own(images.subset_batches_attention)),
            subset_ffn=count(images.own(images.subset_batches_ffn)),
            everywhere=self._setup.num_images,
            uncached=max(0, count(own) - cached),
            uncached_calibrated=max(0, count(calibrated) - cached),
            keeps_states=self._planner.fits,
        )
        rates = Rates(
            self._reading_each(clock), clock.seconds_each(BACKBONE), clock.seconds_each(TRANSFORMER),
            clock.seconds_each(SCORES), self._map_each,
        )  # fmt: skip
        tally = SearchTally(
            self._config, self._counts, rates, bench.modules, widths_of(self._setup.model, self._config.scope,
            self._units), bench.counter.step_shares, costs,
        )  # fmt: skip
        tally.begin()
        if self._config.method.uses_sensitivities:
            gradients = count(calibrated), count(calibrated) * clock.seconds_each(GRADIENTS)
            tally.add(GRADIENTS, *gradients)
            for _ in fewer_layers(self._options):  # calibrated again
                tally.add(GRADIENTS, *gradients, AT_MOST)
        if self._config.method.search == "global":
            tally.by_budget(self._past.trials, self._past.layers)
        else:
            tally.by_visits(self._schedule, self._units, self._past.decisions)
        return tally

    def _reading_each(self, clock: PhaseClock, workers: int | None = None) -> float:
        """Return the seconds that the search waits for an image, read by `workers` beside the backbone."""
        workers = self._options.data.num_workers if workers is None else workers
        return waiting(clock.seconds_each(READING), clock.seconds_each(BACKBONE), workers)

    @property
    def _cached_share(self) -> float:
        need, storage = self._planner.need, self._storage
        features = need.features if storage.dtype is None else need.halved
        room = storage.max_bytes - min(need.states, storage.max_bytes / 2)
        return min(1.0, room / features) if features else 1.0

    def _add_latencies(self, tally: Tally) -> None:
        """Time one turn of the latency table, in the main process."""
        config, setup = self._config, self._setup
        if config.cost_unit != "latency" or config.latency_table is not None:
            return
        setting = Setting.of(setup.device, setup.image_size_hw, self._options.data.batch_size, config.amp)
        widths = widths_of(setup.model, config.scope, self._units)
        done = len(self._past.turns)
        measurement = Measurement(setup.model, config.scope, setting, widths, setup.device, self._past.turns)
        if done < measurement.num_turns:
            turn = distributed.on_main(measurement.measure)
            measurement.turns += [turn] * (measurement.turns_in_round - done)
            left = measurement.num_turns - done
            tally.add(LATENCIES, left, left * turn.seconds, ABOUT)

    @property
    def _title(self) -> str:
        config = self._config
        processes = distributed.world_size()
        each = f", on each of {processes} processes" if processes > 1 else ""
        return (
            f"plan of --search {config.search} on {self._setup.num_images:,} images of {config.split}, "
            f"{self._setup.image_size_hw[0]} x {self._setup.image_size_hw[1]} pixels the first{each}"
        )

    def _facts(self) -> list[str]:
        need, work, storage = self._planner.need, self._planner.work, self._storage
        place = "RAM" if storage.device.type == "cpu" else str(storage.device)
        halved = " in bfloat16" if storage.dtype is not None else ""
        features = need.halved if storage.dtype is not None else need.features
        free = ", ".join(
            f"{gigabytes(number)} of {'RAM' if device.type == 'cpu' else device}" for device, number in
            self._planner.free.items()
        )  # fmt: skip
        each = " for each process" if processes_here() > 1 else ""
        verdict = "they fit" if self._planner.fits else f"{100 * self._cached_share:.0f} % of the features fit"
        return [
            f"cached: features {gigabytes(features)}{halved}, states at most {gigabytes(need.states)} in {place}, of "
            f"{gigabytes(storage.max_bytes)} for them: {verdict}",
            f"besides: {gigabytes(work.passes)} for passes and calibration on {self._setup.device.type}; in RAM "
            f"{gigabytes(work.fits)} for fits, {gigabytes(work.evaluation)} for mAP, {gigabytes(work.reading)} for "
            f"images read ahead; free{each}: {free} (a fifth stays unused)",
            *self._report(),
        ]

    def _report(self) -> list[str]:
        """Return a sentence about the report of several budgets, whose detectors see images one by one."""
        budgets = self._config.keep or self._config.target_ms or ()
        if len(budgets) < 2:
            return []
        seconds = self._clock.seconds_each(BACKBONE) + self._clock.seconds_each(TRANSFORMER)
        detectors = 1 + len(budgets)
        in_split = len(load_annotations(split_of(self._options.data, SPLIT).annotation_file).image_ids)
        images = min(COMPARED_IMAGES, in_split)
        return [
            f"after it, the main process compares {detectors} detectors on the first {images} images of {SPLIT} for "
            f"the report: {ABOUT} {shown_time(detectors * images * seconds)}, not in the total"
        ]

    def _changes(self, plan: RunPlan) -> Iterator[tuple[str, float]]:
        """Yield options that would change the plan, and the seconds that they would save by its figures."""
        counts, clock, workers = self._counts, self._clock, self._options.data.num_workers
        reads = next((p.count for p in plan.phases if p.name == READING), 0.0)
        if counts.uncached:
            fitting = int(self._setup.num_images * self._cached_share)
            again = plan.seconds_of(READING) + plan.seconds_of(BACKBONE)
            saved = again * (reads - counts.read) / reads
            need = self._planner.need
            yield f"{gigabytes(need.total(self._storage.dtype))} of memory for the cache (--cache_gb)", saved
            if self._config.cache_dtype == "same" and need.total(torch.bfloat16) <= self._storage.max_bytes:
                yield "--cache_dtype bfloat16", saved
            if fitting:
                yield from self._fewer_images(plan, fitting, ", whose features all fit", saved)
        for more in (2, 4, 8, 16):
            if workers < more <= cores():
                yield f"--num_workers {more}", reads * (self._reading_each(clock) - self._reading_each(clock, more))
        if not counts.uncached and self._setup.num_images >= 4 * (self._config.calibration_images or 1):
            yield from self._fewer_images(plan, self._setup.num_images // 2, ", with a less certain mAP", 0.0)
        devices = torch.cuda.device_count() if self._setup.device.type == "cuda" else 1
        if devices > distributed.world_size():
            divided = plan.seconds - plan.seconds_of(FITS) - plan.seconds_of(MAP) - plan.seconds_of(LATENCIES)
            yield f"torchrun --nproc_per_node {devices}", divided * (1 - distributed.world_size() / devices)

    def _fewer_images(self, plan: RunPlan, images: int, why: str, saved: float) -> Iterator[tuple[str, float]]:
        of_images = (READING, BACKBONE, TRANSFORMER, MAP)
        share = 1 - images / self._setup.num_images
        rest = sum(map(plan.seconds_of, of_images)) - saved
        yield f"--search_images {images}{why}", saved + share * max(0.0, rest)
