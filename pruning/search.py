"""Search by visits: find for one module after the other the least width that keeps enough mAP.

`grow` adds channels to an empty module step by step: the forward selection of Ye et al. (arXiv 2003.01794, 2010.15969)
as in Huang et al. (J. Donghua Univ. 42(1), 2025). `bisect` halves the range of widths, keeping a ranking's first
channels and reconstructing the module. `Search` decides; a `Workbench` runs the network.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from models.prunable import PrunableModule
from models.residual import BLOCK
from pruning.journal import Decision, Effort
from pruning.kept_channels import Kept, add, all_kept, check_kept, missing, none_kept, width_of
from pruning.method import Method
from pruning.schedule import Schedule
from pruning.scores import Ranking
from pruning.selection import Order, best_of_each_head, draw_candidates
from pruning.state_cache import PassCounter
from util import distributed
from util.errors import UserError

Prediction = tuple[Order, dict[int, float]]  # the order of a module's channels, and its damage by width


class Workbench(Protocol):
    """The network operations that a search needs."""

    method: Method
    ranking: Ranking
    counter: PassCounter
    loss: float  # mean over the calibration images of the whole network, 0 without calibration

    @property
    def modules(self) -> Mapping[str, PrunableModule]:
        """Prunable modules by name, in network order."""

    def reset(self) -> None:
        """Remove all gates and restore the original weights."""

    def begin(self, name: str) -> None:
        """Make `name` the current module; gates of other modules are unchanged."""

    def rank(self, name: str) -> Order:
        """Return the order in which the current module keeps its channels."""

    def set_kept(self, name: str, kept: Kept) -> None:
        """Gate the current module to `kept` and refit it."""

    def damages(self, name: str, order: Order, widths: Sequence[int]) -> dict[int, float]:
        """Return the predicted damage at each width; the current module is unpruned afterwards."""

    def predict(self, name: str, widths: Sequence[int]) -> Callable[[], Prediction]:
        """Measure the current module; return what gives its order and damages, which does not communicate."""

    def save(self) -> Any:
        """Return the state of the network, for `load`."""

    def load(self, saved: Any) -> None:
        """Restore what `save` returned."""

    def subset_ap(self, name: str) -> float:
        """Return mAP in [0, 1] of the subset for modules of this kind."""

    def full_ap(self) -> float:
        """Return mAP in [0, 1] of the whole split."""

    def transformer_params(self, kept: Mapping[str, Kept]) -> int:
        """Return the number of parameters of the transformer cut to `kept`."""


@dataclass(frozen=True)
class Units:
    """Number of channels that a step adds and scores.

    Attributes:
        attention_unit: channels added to each head of an attention.
        ffn_unit: channels added to an FFN.
        block_unit: channels added to a residual block.
        attention_candidates: most channels of an attention scored in a step.
        ffn_candidates: most channels of an FFN scored in a step.
        seed: of the random candidates.
        min_units: least units of a module: 1, or 0 to let a search remove it.
    """

    attention_unit: int
    ffn_unit: int
    block_unit: int
    attention_candidates: int
    ffn_candidates: int
    seed: int
    min_units: int = 1

    def channels(self, module: PrunableModule) -> int:
        """Return the number of channels that a step adds to a module."""
        if module.is_attention:
            return self.attention_unit * module.nheads
        return self.block_unit if module.kind == BLOCK else self.ffn_unit

    def candidates(self, module: PrunableModule) -> int:
        """Return the largest number of channels that a step scores."""
        return self.attention_candidates if module.is_attention else self.ffn_candidates

    def generator(self, name: str, step: int) -> torch.Generator:
        """Return the generator of a step's candidates, which depends on seed, module and step only."""
        # The CPU generator uses only 32 bits of a seed.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{step}".encode()))


@dataclass(frozen=True)
class Thresholds:
    """Required mAP in [0, 1] of a visit; see `Schedule`."""

    target_ap: float
    subset_threshold_ap: float
    full_threshold_ap: float


@dataclass
class Search:
    """Search by visits; `run` returns the kept set of every module.

    Attributes:
        bench: the whole network, without gates.
        schedule: order, targets and tolerances.
        units: size of the steps.
        base_ap: mAP in [0, 1] of the whole split before the search.
        on_decision: called with each new decision.
        replayed: earlier decisions of a resumed search, in order; they are not measured again.
    """

    bench: Workbench
    schedule: Schedule
    units: Units
    base_ap: float
    on_decision: Callable[[Decision], None] = lambda decision: None
    replayed: Iterable[Decision] = ()
    kept: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = {name: all_kept(module) for name, module in self.bench.modules.items()}
        self._ap_before = self.base_ap
        # Machines round powers differently, so all processes use the main one's thresholds.
        self._visits = distributed.on_main(self._thresholds)
        self._past = deque(self.replayed)
        self.effort = Effort(self.bench.counter, self._past)
        self._kept_in_bench: Kept | None = None

    @property
    def ap(self) -> float:
        """mAP in [0, 1] of the whole split after the last visit."""
        return self._ap_before

    def run(self) -> dict[str, Kept]:
        """Visit every module and return the kept sets."""
        visit_module = self._bisect if self.bench.method.search == "bisect" else self._grow
        for visit, name in enumerate(self.schedule.order(self.bench.modules)):
            self.bench.begin(name)
            self._kept_in_bench = None
            for decision, is_new in visit_module(visit, name):
                if decision.accepted:
                    # Apply an accepted decision to the network before `on_decision` is called.
                    self._show_bench(name, decision.kept)
                if is_new:
                    self.on_decision(decision)
            assert decision.full_ap is not None  # the last decision of a visit is accepted by the whole split's mAP
            self._ap_before = decision.full_ap
        return self.kept

    def _grow(self, visit: int, name: str) -> Iterator[tuple[Decision, bool]]:
        """Grow an empty module, yielding each step's decision and whether it is new; the last decision is accepted.

        With `min_units` 0 the first decision is on the empty module.
        Once the subset's mAP has passed, only the whole split's is measured.
        """
        module = self.bench.modules[name]
        kept, step, subset_passed, accepted = none_kept(module), 0, False, False
        while not accepted:
            decision, is_new = self._past_decision(visit, step, name), False
            if decision is None:
                is_empty = step == 0 and self.units.min_units == 0
                grown = kept if is_empty else add(kept, self._candidates_to_add(module, kept, step))
                decision, is_new = self._measure(visit, step, name, grown, subset_passed, accept=True), True
            yield decision, is_new
            kept, accepted, step = decision.kept, decision.accepted, step + 1
            subset_passed = subset_passed or decision.full_ap is not None
            self.kept[name] = kept

    def _bisect(self, visit: int, name: str) -> Iterator[tuple[Decision, bool]]:
        """Bisect to the least width that passes, yielding as `_grow` does; the last decision accepts it.

        The whole module passes without measurement, because it leaves the detector unchanged.
        """
        module, unit = self.bench.modules[name], self.units.channels(self.bench.modules[name])
        fails, passes, step = self.units.min_units - 1, -(-module.width // unit), 0
        kept, full_ap, order = all_kept(module), self._ap_before, None
        while passes - fails > 1:
            middle = (fails + passes) // 2
            decision, is_new = self._past_decision(visit, step, name), False
            if decision is None:
                order = order or self.bench.rank(name)
                tried = order.kept(min(middle * unit, module.width))
                decision, is_new = self._measure(visit, step, name, tried, False, accept=False), True
            yield decision, is_new
            step += 1
            if decision.full_ap is not None and decision.full_ap >= self._visits[visit].full_threshold_ap:
                passes, kept, full_ap = middle, decision.kept, decision.full_ap
            else:
                fails = middle
        self.kept[name] = kept
        decision, is_new = self._past_decision(visit, step, name), False
        if decision is None:
            decision, is_new = self._decision(visit, step, name, kept, None, full_ap, True), True
        yield decision, is_new

    def _past_decision(self, visit: int, step: int, name: str) -> Decision | None:
        """Return the next replayed decision, or None if there is none left.

        Raises:
            UserError: it belongs to another search.
        """
        if not self._past:
            return None
        decision = self._past.popleft()
        if (decision.visit, decision.step, decision.module) != (visit, step, name):
            raise UserError(f"journal: found step {decision.step} of {decision.module}, expected step {step} of {name}")
        check_kept(self.bench.modules[name], decision.kept, "journal")
        return decision

    def _candidates_to_add(self, module: PrunableModule, kept: Kept, step: int) -> torch.Tensor:
        """Choose the channels that a step of `_grow` adds."""
        free, unit = missing(module, kept), self.units.channels(module)
        if len(free) <= unit:
            return free
        generator = self.units.generator(module.name, step)
        candidates = draw_candidates(module, kept, self.units.candidates(module), unit, generator)
        scores = self.bench.ranking(module, module.parts, kept, candidates)
        return best_of_each_head(module, candidates, scores, unit)

    def _measure(self, visit: int, step: int, name: str, kept: Kept, subset_passed: bool, *, accept: bool) -> Decision:
        """Measure a kept set: mAP of the subset unless that has passed before, then mAP of the whole split."""
        self.kept[name] = kept
        subset_ap = full_ap = None
        if width_of(kept) == self.bench.modules[name].width:
            # A whole module leaves the detector unchanged.
            return self._decision(visit, step, name, kept, None, self._ap_before, accept)
        self._show_bench(name, kept)
        if not subset_passed:
            subset_ap = self.bench.subset_ap(name)
            # A subset without boxes has no mAP (-1), so the whole split decides.
            subset_passed = subset_ap < 0 or subset_ap >= self._visits[visit].subset_threshold_ap
        if subset_passed:
            full_ap = self.bench.full_ap()
        passed = full_ap is not None and full_ap >= self._visits[visit].full_threshold_ap
        return self._decision(visit, step, name, kept, subset_ap, full_ap, accept and passed)

    def _show_bench(self, name: str, kept: Kept) -> None:
        """Apply a kept set to the bench's network unless it already has it."""
        if kept is not self._kept_in_bench:
            self.bench.set_kept(name, kept)
            self._kept_in_bench = kept

    def _thresholds(self) -> list[Thresholds]:
        of_visit = (self.schedule.target_ap, self.schedule.subset_threshold_ap, self.schedule.full_threshold_ap)
        return [
            Thresholds(*(threshold(self.base_ap, visit) for threshold in of_visit))
            for visit in range(len(self.bench.modules))
        ]

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
            target_ap=self._visits[visit].target_ap,
            subset_ap=subset_ap,
            full_ap=full_ap,
            accepted=accepted,
            transformer_params=self.bench.transformer_params(self.kept),
            **self.effort.so_far(),
        )
