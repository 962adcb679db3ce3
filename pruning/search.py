"""The search: module after module, channels are added to an empty module until the detector's mAP is good enough.

The greedy step is the forward selection of Ye et al. (arXiv 2003.01794, 2010.15969) as Huang et al. (J. Donghua Univ.
42(1), 2025) use it. `Search` decides; everything that runs a network is behind `Workbench`.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pruning.features import PassCounter
from pruning.gates import Gated
from pruning.journal import Decision
from pruning.kept import Kept, add, all_kept, missing, none_kept, unit_channels, width_of
from pruning.schedule import Schedule
from pruning.scores import Ranking, best_of_each_head, draw_candidates


class Workbench(Protocol):
    """The network under search, as far as the decisions need it."""

    modules: Mapping[str, Gated]
    ranking: Ranking
    counter: PassCounter

    def begin(self, name: str) -> None:
        """Make ready to search module `name`; gates of others stay as they are."""

    def set_kept(self, name: str, kept: Kept) -> None:
        """Let only these channels of a module through."""

    def subset_ap(self, name: str) -> float:
        """mAP in [0, 1] of the subset for a module of that kind."""

    def full_ap(self, name: str) -> float:
        """mAP in [0, 1] of the whole split."""

    def transformer_params(self, kept: Mapping[str, Kept]) -> int:
        """Parameters of the transformer once it is cut to `kept`."""


@dataclass(frozen=True)
class Units:
    """How much a step adds and how many channels it looks at.

    Attributes:
        attention_unit: channels added to each head of an attention.
        ffn_unit: channels added to an FFN.
        attention_candidates: most channels of an attention scored in a step.
        ffn_candidates: most channels of an FFN scored in a step.
        seed: of the candidates that are drawn.
    """

    attention_unit: int
    ffn_unit: int
    attention_candidates: int
    ffn_candidates: int
    seed: int

    def channels(self, module: Gated) -> int:
        """Channels that one step adds to a module."""
        return unit_channels(module, self.attention_unit, self.ffn_unit)

    def candidates(self, module: Gated) -> int:
        """Most channels that one step scores."""
        return self.attention_candidates if module.is_attention else self.ffn_candidates

    def generator(self, name: str, step: int) -> torch.Generator:
        """The source of a step's candidates; a function of seed, module and step, so that no state is carried."""
        # One 32-bit number: the CPU generator reads no more of a seed.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{step}".encode()))


@dataclass
class Search:
    """The greedy search of one schedule.

    Attributes:
        schedule: order, targets and thresholds.
        units: sizes of the steps.
        base_ap: mAP of the detector before the search, in [0, 1].
        kept: kept sets of all modules, whole until they are visited.
        on_decision: called with each decision once it is made.
    """

    bench: Workbench
    schedule: Schedule
    units: Units
    base_ap: float
    on_decision: Callable[[Decision], None] = lambda decision: None
    kept: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = {name: all_kept(module) for name, module in self.bench.modules.items()}
        self._ap_before = self.base_ap
        self._began = time.monotonic()

    def run(self) -> dict[str, Kept]:
        """Visit every module; returns the kept sets."""
        for visit, name in enumerate(self.schedule.order(self.bench.modules)):
            self.bench.begin(name)
            for decision in self._visit(visit, name):
                self.on_decision(decision)
        return self.kept

    def _visit(self, visit: int, name: str) -> Iterator[Decision]:
        """Grow one module from nothing, yielding each step's decision; the last one is accepted.

        Once the subset's mAP has passed, the whole split's alone decides.
        """
        module = self.bench.modules[name]
        kept = none_kept(module)
        subset_passed, step, accepted = False, 0, False
        while not accepted:
            kept = add(kept, self._choose(module, kept, step))
            self.kept[name] = kept
            self.bench.set_kept(name, kept)
            subset_ap = full_ap = None
            if width_of(kept) == module.width:
                # A whole module leaves the detector as the visit found it.
                accepted, full_ap = True, self._ap_before
            else:
                if not subset_passed:
                    subset_ap = self.bench.subset_ap(name)
                    # A subset without boxes (-1) can tell nothing: the whole split decides.
                    subset_passed = subset_ap < 0 or subset_ap >= self.schedule.subset_threshold_ap(self.base_ap, visit)
                if subset_passed:
                    full_ap = self.bench.full_ap(name)
                    accepted = full_ap >= self.schedule.full_threshold_ap(self.base_ap, visit)
            yield self._decision(visit, step, name, kept, subset_ap, full_ap, accepted)
            step += 1
        self._ap_before = full_ap

    def _choose(self, module: Gated, kept: Kept, step: int) -> torch.Tensor:
        """The channels that a step adds."""
        free, unit = missing(module, kept), self.units.channels(module)
        if len(free) <= unit:
            return free
        generator = self.units.generator(module.name, step)
        candidates = draw_candidates(module, kept, self.units.candidates(module), unit, generator)
        return best_of_each_head(module, candidates, self.bench.ranking(module, kept, candidates), unit)

    def _decision(
        self,
        visit: int,
        step: int,
        name: str,
        kept: Kept,
        subset_ap: float | None,
        full_ap: float | None,
        accepted: bool,
    ) -> Decision:
        return Decision(
            visit=visit,
            module=name,
            full_width=self.bench.modules[name].width,
            step=step,
            width=width_of(kept),
            kept=kept,
            target_ap=self.schedule.target_ap(self.base_ap, visit),
            subset_ap=subset_ap,
            full_ap=full_ap,
            accepted=accepted,
            transformer_params=self.bench.transformer_params(self.kept),
            image_passes=self.bench.counter.images,
            whole_passes=round(self.bench.counter.whole_passes, 3),
            seconds=round(time.monotonic() - self._began, 3),
        )
