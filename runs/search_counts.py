"""Count what a search will do in each phase, by its options, its journal and a sample of each kind of module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from models.prunable import PrunableModule
from models.residual import BLOCK
from pruning.budget import ATTENTION_WIDTHS_MEASURED, EVALUATIONS, cuts_at_most, widths_to_measure
from pruning.config import SearchConfig
from pruning.divided_fits import busiest_share
from pruning.journal import Decision, Layers, Trial
from pruning.schedule import Schedule, role_of
from pruning.search import Units
from runs.plan import ABOUT, AT_MOST, Snapshot, Tally
from util import distributed
from util.phases import BACKBONE, FITS, MAP, MOMENTS, READING, SCORES, TRANSFORMER


@dataclass(frozen=True)
class SampledModule:
    """What a sample of one module took.

    Attributes:
        name, width: of the module.
        images: calibration images of the sample in this process.
        rank: of ordering its channels; of measuring them if one process orders them and prices all widths at once.
        first, more: of its first width and of another one: their damage, or a fit in a search by visits.
        removed: of width 0.
        cut: of the fit of a cut detector.
    """

    name: str
    width: int
    images: int
    rank: Snapshot = field(default_factory=dict)
    first: Snapshot = field(default_factory=dict)
    more: Snapshot = field(default_factory=dict)
    removed: Snapshot = field(default_factory=dict)
    cut: Snapshot = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """Numbers of images.

    Attributes:
        read: of this process, with the first batch, which every process reads.
        own: of this process's share.
        calibrated: calibration images of this process.
        first_batch: of the split's first batch.
        subset_attention, subset_ffn: of this process's share of the subset.
        everywhere: of all processes.
        uncached, uncached_calibrated: of this process's share, and of its calibration images, without features.
        keeps_states: whether all states fit that would be kept.
    """

    read: int
    own: int
    calibrated: int
    first_batch: int
    subset_attention: int
    subset_ffn: int
    everywhere: int
    uncached: int = 0
    uncached_calibrated: int = 0
    keeps_states: bool = True


@dataclass(frozen=True)
class Rates:
    """Seconds: of an image read, through the backbone, through all modules; of a scored channel; of mAP per image."""

    reading: float
    backbone: float
    passing: float
    scores: float
    map_image: float


def group_of(name: str) -> str:
    """Return the modules that a module stands for in the sample: its kind, or the stage of a residual block."""
    role = role_of(name)
    return name.rpartition(".")[0] if role == "backbone" else role


class SearchTally(Tally):
    """Adds up a search."""

    def __init__(
        self, config: SearchConfig, images: Images, rates: Rates, modules: Mapping[str, PrunableModule],
        widths: Mapping[str, Sequence[int]], shares: Mapping[str, float], costs: Mapping[str, SampledModule],
    ) -> None:  # fmt: skip
        """`widths` are those that may be tried, `shares` the steps' shares of a pass, `costs` those of each group."""
        super().__init__()
        self._config, self._images, self._rates = config, images, rates
        self._modules, self._widths, self._shares, self._costs = modules, widths, shares, costs
        self._steps = list(shares)
        self._busiest = busiest_share(modules, distributed.world_size())

    def begin(self) -> None:
        """Add the reading of the images, their features and the mAP before the search."""
        self._read(self._images.read)
        self.evaluations(1)

    def evaluations(self, count: int, layers: int = 1, bound: str = "") -> None:
        """Add mAP of all images after one pass, for each of `layers`."""
        images = self._images
        self._pass(count * images.own, bound)
        self._read(count * images.uncached, bound)
        self.add(MAP, count * layers * images.everywhere, count * layers * images.everywhere * self._rates.map_image,
                 bound)  # fmt: skip

    def by_budget(self, trials: Sequence[Trial], layers: Sequence[Layers]) -> None:
        """Add a search by budget; `trials` and `layers` are those of the journal."""
        config, counts = self._config, range(1)
        measured = None if config.has_budget else ATTENTION_WIDTHS_MEASURED
        cuts = cuts_at_most(len(config.budgets), config.min_units) if config.has_budget else EVALUATIONS
        if config.min_dec_layers is not None:
            most = 1 + max(int(name.split(".")[1]) for name in self._steps if name.startswith("decoder"))
            counts = range(most - config.min_dec_layers + 1)
            if len(counts) > 1 and not layers:
                self.evaluations(1, layers=most)
        for number in counts:
            bound = AT_MOST if number else ""
            self._moves(list(self._modules), self._images.calibrated, bound)
            for name, module in self._modules.items():
                to_measure = widths_to_measure(module, self._widths[name], measured)
                self._damages(name, to_measure, bound)
        # Without a budget, the first trial of fewer layers cuts nothing.
        measured_trials = sum(any(width < self._modules[n].width for n, width in t.widths.items()) for t in trials)
        left = max(0, cuts * len(counts) - measured_trials)
        self.evaluations(left, bound=AT_MOST)
        blocks = [name for name, module in self._modules.items() if module.kind == BLOCK]
        for _ in range(left + bool(trials)):  # a replayed trial that is chosen is cut again
            self._moves(blocks, self._images.calibrated, AT_MOST)  # of the unpruned detector
            for name in self._modules:
                self._module(name, self._costs[group_of(name)].cut, AT_MOST)

    def by_visits(self, schedule: Schedule, units: Units, decisions: Sequence[Decision]) -> None:
        """Add a search by visits; `decisions` are those of the journal."""
        grows, order = self._config.method.search == "grow", schedule.order(self._modules)
        bound = ABOUT if grows else AT_MOST
        done = [sum(decision.visit == visit for decision in decisions) for visit in range(len(order))]
        accepted = {decision.visit for decision in decisions if decision.accepted}
        self._moves(order, self._images.own, bound)
        for visit, name in enumerate(order):
            module, cost = self._modules[name], self._costs[group_of(name)]
            if visit in accepted:
                self._module(name, cost.cut, bound)
                continue
            steps = max(0, most_steps(module, units, grows) - done[visit])
            if grows:
                self._grow(name, units, steps)
            else:
                self._damages(name, [1] * steps, bound)
                self._module(name, cost.more, bound)  # the accepted width may not be the last that was tried
            self._measure(name, steps, 1 if grows else steps, bound)

    def _measure(self, name: str, subsets: int, wholes: int, bound: str) -> None:
        """Add mAP of the subset and of all images from the input of a module on."""
        images, module = self._images, self._modules[name]
        share = self._share(name if images.keeps_states else self._steps[0], None)
        subset = images.subset_attention if module.is_attention else images.subset_ffn
        self._pass((subsets * subset + wholes * images.own) * share, bound)
        self._read((subsets + wholes) * images.uncached, bound)
        everywhere = subsets * min(images.everywhere, self._subset(module)) + wholes * images.everywhere
        self.add(MAP, everywhere, everywhere * self._rates.map_image, bound)

    def _subset(self, module: PrunableModule) -> int:
        batches = self._config.subset_batches_attention if module.is_attention else self._config.subset_batches_ffn
        return batches * self._images.first_batch

    def _grow(self, name: str, units: Units, steps: int) -> None:
        """Add the scores of candidates by the exact loss of the first batch."""
        channels = steps * min(units.candidates(self._modules[name]), self._modules[name].width)
        self.add(SCORES, channels, channels * self._rates.scores, ABOUT)
        self._pass(channels * self._images.first_batch * self._share(name, None), ABOUT)

    def _damages(self, name: str, widths: Sequence[int], bound: str) -> None:
        cost = self._costs[group_of(name)]
        self._module(name, cost.rank, bound)
        is_divided = not self._modules[name].is_attention and self._config.method.search == "global"
        above = sum(width > 0 for width in widths)
        for number in range(above):
            spent, share = (cost.more, 1.0) if number else (cost.first, self._busiest if is_divided else 1.0)
            self._module(name, spent, bound, share)
        if 0 in widths:
            self._module(name, cost.removed, bound)

    def _module(self, name: str, spent: Snapshot, bound: str, share: float = 1.0) -> None:
        """Add what a module takes, by the sample of its group: per calibration image, but for fits.

        `share` is that of one process in the fits.
        """
        cost = self._costs[group_of(name)]
        scale = self._images.calibrated / cost.images if cost.images else 0.0
        wider = (self._modules[name].width / cost.width) ** 3  # matrices are inverted and multiplied
        for phase, (count, seconds) in spent.items():
            if phase in (TRANSFORMER, SCORES) and self._config.method.ranking == "exact":  # on the first batch
                of_rest = self._share(name, None) / self._share(cost.name, None) if phase == TRANSFORMER else 1.0
                self.add(phase, count * of_rest, seconds * of_rest, ABOUT)
            if phase in (TRANSFORMER, MAP, SCORES, READING, BACKBONE):
                continue  # counted by themselves
            if phase == MOMENTS and not self._images.keeps_states:  # each pass begins at the features or images
                passes = count / max(1, cost.images)
                self._pass(count * scale * self._share(self._steps[0], name), AT_MOST)
                self._read(math.ceil(passes) * self._images.uncached_calibrated, AT_MOST)
            of_images = 1.0 if phase == FITS else scale
            self.add(phase, count * of_images, seconds * (wider * share if phase == FITS else of_images), bound)

    def _moves(self, order: Sequence[str], images: int, bound: str) -> None:
        """Add the passes that bring states to the inputs of the modules in this order."""
        position = self._steps[0]
        share = 0.0
        for name in order:
            is_back = self._steps.index(name) < self._steps.index(position)
            share += self._share(self._steps[0] if is_back else position, name)
            position = name
        self._pass(images * share, bound)

    def _share(self, start: str, stop: str | None) -> float:
        last = len(self._steps) if stop is None else self._steps.index(stop)
        return sum(self._shares[name] for name in itertools.islice(self._steps, self._steps.index(start), last))

    def _pass(self, images: float, bound: str = "") -> None:
        self.add(TRANSFORMER, images, images * self._rates.passing, bound)

    def _read(self, images: int, bound: str = "") -> None:
        self.add(READING, images, images * self._rates.reading, bound)
        self.add(BACKBONE, images, images * self._rates.backbone, bound)


def most_steps(module: PrunableModule, units: Units, grows: bool) -> int:
    """Return the most steps of a visit that measure mAP."""
    steps = -(-module.width // units.channels(module))
    if grows:  # the whole module is not measured
        return steps - 1 + (units.min_units == 0)
    return math.ceil(math.log2(max(1, steps - (units.min_units - 1))))
