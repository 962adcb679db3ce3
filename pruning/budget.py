"""A search by budget: so much of the transformer may stay; mAP is only measured to check.

Every module's damage at every width is predicted from calibration moments and gradients with all others whole. Widths
then minimise the sum of damages for the cost, and the detector is cut and reconstructed module by module in network
order, each on what the cut modules before it give. mAP says by how much the next budget has to differ.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.prunable import PrunableModule
from pruning.allocation import Tables, allocate, between, check_affordable, sum_of
from pruning.journal import Effort, Trial
from pruning.kept import Kept
from pruning.search import Workbench
from pruning.selection import Order
from util import distributed
from util.errors import UserError

# Damages add up where they are small. Where much is cut they compound, and their roots predict better; which power
# is best is found by measuring mAP.
POWERS = (0.5, 1.0, 0.25)
EVALUATIONS = 4  # of mAP at most when the least budget is looked for; widths measured before are none
PRECISION = 0.01  # of the whole cost, to which that budget is then known
# The damage of queries takes a forward for each width, so that few are measured and those between follow.
ATTENTION_WIDTHS_MEASURED = 4
STEEPEST = 4.0  # power of the damage that mAP may be taken to fall by
MIN_LOSS = 1e-4  # of mAP: less is taken for this much, since it gives no slope
AIM = 0.97  # of the mAP that may be lost, so that a prediction a little off still passes
ROUNDING = 1e-9  # of the whole cost
NEAR = 0.1  # of the same: who comes as near to losing it all has found the budget
# mAP falls by this many times the fraction that the loss is predicted to rise by: 4.2 to 5.0 times on the demo where 3
# to 30 % of its mAP are lost. Only the first trial hangs on it.
AP_FALL_FOR_LOSS = 4.7


@dataclass(frozen=True)
class Cut:
    """A network that was cut: the kept sets, and what brings it back (`Workbench.load`)."""

    kept: dict[str, Kept]
    saved: Any


@dataclass
class BudgetSearch:
    """One search by budget; `run` gives the kept set of every module.

    Attributes:
        bench: the network, whole, with no gates.
        costs: of each module at each of its widths, in parameters or multiply-accumulates; see `pruning.allocation`.
        total_cost: of the whole transformer.
        base_ap: mAP in [0, 1] of the whole split before the search.
        on_trial: called with each new trial.
        replayed: trials of the same search that were made before, in order; they are not measured again.
        progress: called with the name of each module that is done with, and the width it was cut to; None where its
            damage was predicted.
        trials: those measured, replayed ones among them.
        damages: of each module at each of its widths, as the last `run` predicted them.
    """

    bench: Workbench
    costs: Tables
    total_cost: float
    base_ap: float
    on_trial: Callable[[Trial], None] = lambda trial: None
    replayed: Sequence[Trial] = ()
    progress: Callable[[str, int | None], Any] = lambda name, width: None
    trials: list[Trial] = field(default_factory=list)
    damages: Tables = field(default_factory=dict)

    def run(self, keep: float | None, threshold_ap: float = 0.0) -> tuple[dict[str, Kept], Trial | None]:
        """Cut to the fraction `keep` of the cost, or (None) as far as mAP is not below `threshold_ap`.

        Returns:
            The kept sets and the trial that was taken; everything and None if no trial was good enough.

        Raises:
            UserError: one unit of every module costs more than that, or `replayed` are trials of another search.
        """
        if keep is not None:
            check_affordable(keep, self.costs, self.total_cost)
        self._past, self.effort = deque(self.replayed), Effort(self.bench.counter, self.replayed)
        # A fraction that is asked for is met in few trials: more hangs on the prediction, so nothing is guessed.
        self._orders, self.damages = self._predict(ATTENTION_WIDTHS_MEASURED if keep is None else None)
        best, cut = self._least_that_passes(threshold_ap) if keep is None else self._best_power(keep)
        if best is None or cut is None:  # a replayed trial has no cut
            return self._cut(self._whole if best is None else best.widths), best
        self.bench.load(cut.saved)
        return cut.kept, best

    @property
    def _whole(self) -> dict[str, int]:
        return {name: module.width for name, module in self.bench.modules.items()}

    def _best_power(self, keep: float) -> tuple[Trial | None, Cut | None]:
        """The trial of the greatest mAP among `POWERS`, and its cut."""
        best: Trial | None = None
        best_cut: Cut | None = None
        for power in POWERS:
            widths = distributed.on_main(functools.partial(self._allocate, keep, power))
            trial, cut = self._trial(keep, power, widths)
            if best is None or trial.full_ap > best.full_ap:
                best, best_cut = trial, cut
        return best, best_cut

    def _least_that_passes(self, threshold_ap: float) -> tuple[Trial | None, Cut | None]:
        """Narrow the range of kept fractions; whatever passes with less is the better one. None if nothing passes.

        What mAP a fraction will give is predicted from the trials before it, see `_guess`. A fraction whose widths are
        known narrows the range without an evaluation.
        """
        fails, passes = self._kept_fraction({name: min(table) for name, table in self.costs.items()}), 1.0
        best: Trial | None = None
        best_cut: Cut | None = None
        allowed = self.base_ap - threshold_ap
        losses: dict[float, float] = {}
        evaluations = 0
        while evaluations < EVALUATIONS and passes - fails > PRECISION:
            keep, widths = distributed.on_main(functools.partial(self._next, losses, allowed, fails, passes))
            if not fails < keep < passes:
                break  # no number lies between the two
            if widths == self._whole:
                passes = keep  # nothing is removed, which is no trial
                continue
            trial, cut = self._trial_of(widths), None
            if trial is None:
                trial, cut = self._trial(keep, POWERS[0], widths)
                keep, evaluations = trial.keep, evaluations + 1
            losses[sum_of(self.damages, trial.widths)] = self.base_ap - trial.full_ap
            if trial.full_ap >= threshold_ap:
                passes = keep
                if trial is not best:
                    best, best_cut = trial, cut
            else:
                fails = keep
            if allowed > 0 and 0 <= trial.full_ap - threshold_ap <= NEAR * allowed:
                break
        return best, best_cut

    def _next(
        self, losses: Mapping[float, float], allowed: float, fails: float, passes: float
    ) -> tuple[float, dict[str, int]]:
        keep = self._guess(losses, allowed, fails, passes)
        return keep, self._allocate(keep, POWERS[0])

    def _guess(self, losses: Mapping[float, float], allowed: float, fails: float, passes: float) -> float:
        """The kept fraction between two others with which mAP should fall by what it may.

        Damage is an estimate of what the loss rises by, so that mAP is taken to fall in proportion to it, as it does in
        other networks before any trial, or by the power of it that the two trials nearest to what is allowed show.

        Args:
            losses: mAP that trials lost, by their damages.
            allowed: mAP that may be lost.
        """
        known = sorted(
            (abs(math.log(max(loss, MIN_LOSS) / allowed)), damage, max(loss, MIN_LOSS))
            for damage, loss in losses.items()
            if damage > 0 and allowed > 0
        )
        if not known and self.bench.loss * self.base_ap * allowed > 0:
            known = [(0.0, self.bench.loss / AP_FALL_FOR_LOSS, self.base_ap)]
        if not known:
            return (fails + passes) / 2
        (_, damage, loss), exponent = known[0], 1.0
        if len(known) > 1 and (known[1][2] - loss) * (known[1][1] - damage) > 0:
            exponent = math.log(known[1][2] / loss) / math.log(known[1][1] / damage)
            exponent = min(max(exponent, 1 / STEEPEST), STEEPEST)  # trials that lose alike give no slope
        target = damage * (AIM * allowed / loss) ** (1 / exponent)
        margin = (passes - fails) / 8
        low, high = fails + margin, passes - margin
        while high - low > PRECISION / 8:
            keep = (low + high) / 2
            if sum_of(self.damages, self._allocate(keep, POWERS[0])) > target:
                low = keep
            else:
                high = keep
        return high

    def _allocate(self, keep: float, power: float) -> dict[str, int]:
        """Widths that cost at most the fraction `keep` of the whole."""
        fixed_cost = self.total_cost - sum_of(self.costs, self._whole)
        return allocate(self.damages, self.costs, keep * self.total_cost - fixed_cost, power)

    def _kept_fraction(self, widths: Mapping[str, int]) -> float:
        gone = (self.costs[name][full] - self.costs[name][widths[name]] for name, full in self._whole.items())
        return (self.total_cost - sum(gone)) / self.total_cost

    def _trial_of(self, widths: Mapping[str, int]) -> Trial | None:
        """The trial that was made with these widths."""
        return next((trial for trial in self.trials if trial.widths == widths), None)

    def _trial(self, keep: float, power: float, widths: dict[str, int]) -> tuple[Trial, Cut | None]:
        """The next trial of the search before, or a new one with these widths, which are measured once.

        Returns:
            The trial, and the cut where it was made for it.
        """
        cut = None
        if self._past:
            trial = self._past.popleft()
            self._check_replayed(trial, power)
        else:
            known = self._trial_of(widths)
            if known is None:
                kept, ap = self._cut(widths), self.bench.full_ap()
                cut = Cut(kept, self.bench.save())
            else:
                ap = known.full_ap
            trial = Trial(keep, power, widths, ap, self._kept_fraction(widths), **self.effort.so_far())
            self.on_trial(trial)
        self.trials.append(trial)
        return trial, cut

    def _check_replayed(self, trial: Trial, power: float) -> None:
        """Raise a `UserError` for a trial that this search cannot have made.

        Its widths need not be those that would be predicted now: damages differ by rounding from device to device.
        """
        known = list(trial.widths) == list(self.costs) and all(
            width in self.costs[name] for name, width in trial.widths.items()
        )
        if not known or trial.power != power:
            raise UserError(f"journal: found a trial (power {trial.power:g}) of other modules or widths than these")
        cost = self._kept_fraction(trial.widths)
        if abs(cost - trial.kept_fraction) > ROUNDING or cost > trial.keep + ROUNDING:
            raise UserError(
                f"journal: found a trial that keeps {trial.kept_fraction:g} of the cost, expected {cost:g}, which its "
                f"widths cost, and at most {trial.keep:g}"
            )

    def _predict(self, attention_widths: int | None) -> tuple[dict[str, Order], Tables]:
        """Order of each module's channels, and its damage at each of its widths, all others whole.

        Args:
            attention_widths: how many widths of an attention are measured; None for all.
        """
        orders, damages = {}, {}
        self.bench.reset()
        for name, module in self.bench.modules.items():
            self.bench.begin(name)
            order = orders[name] = self.bench.rank(name)
            widths = list(self.costs[name])
            to_measure = widths_to_measure(module, widths, attention_widths)
            damages[name] = between({w: self.bench.set_kept(name, order.kept(w)) for w in to_measure}, widths)
            # The next module follows this one whole.
            self.bench.set_kept(name, order.kept(module.width))
            self.progress(name, None)
        return orders, damages

    def _cut(self, widths: Mapping[str, int]) -> dict[str, Kept]:
        """Cut and reconstruct all modules in network order."""
        self.bench.reset()
        kept = {}
        for name in self.bench.modules:
            self.bench.begin(name)
            kept[name] = self._orders[name].kept(widths[name])
            self.bench.set_kept(name, kept[name])
            self.progress(name, widths[name])
        return kept


def widths_to_measure(module: PrunableModule, widths: Sequence[int], attention_widths: int | None) -> list[int]:
    """The widths whose damage is measured: so many of an attention with queries, else all; the whole one does none."""
    *below, _ = widths
    count = len(below) if attention_widths is None else attention_widths
    if "query" not in module.parts or len(below) <= count:
        return below
    return sorted({below[place * len(below) // count] for place in range(count)})
