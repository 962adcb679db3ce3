"""Search by budget: choose the widths of all modules at once for a fraction of the cost of the transformer or detector.

Calibration moments and gradients predict each module's damage at each width while all others are whole. The widths
minimise the sum of damages within the budget. The detector is then cut and reconstructed module by module in network
order, each on the activations of the cut modules before it. The measured mAP determines the next budget.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.prunable import PrunableModule
from pruning.allocation import ROUNDING, Budget, Shared, Tables, allocate, between, sum_of
from pruning.cost_tables import Prices
from pruning.divided_fits import DividedFits
from pruning.journal import Effort, Trial
from pruning.kept_channels import Kept
from pruning.search import Prediction, Workbench
from pruning.selection import Order
from pruning.two_budgets import allocate_both
from util import distributed
from util.errors import UserError

# Small damages add up. When much is cut they compound, and their roots predict better. mAP decides between the powers.
POWERS = (0.5, 1.0, 0.25)
# Residual blocks are less redundant, and their damages are measured on images that the fits have not seen.
DETECTOR_POWERS = (1.0, 1.5, 0.75)
EVALUATIONS = 4  # most mAP evaluations when searching for the least budget; known widths need none
PRECISION = 0.01  # of that budget, as a fraction of the whole cost
# Measuring the damage of queries takes a forward for each width, so few are measured and the rest interpolated.
ATTENTION_WIDTHS_MEASURED = 4
STEEPEST = 4.0  # largest exponent of mAP loss as a power of damage
MIN_LOSS = 1e-4  # of mAP; smaller losses are raised to it, since they give no slope
AIM = 0.97  # of the allowed mAP loss, so that a slightly wrong prediction still passes
NEAR = 0.1  # of the allowed mAP loss; a trial this close to it ends the search
# Relative fall of mAP per predicted relative rise of the loss: 4.2 to 5.0 on the demo for mAP losses of 3 to 30 %. Only
# the first trial uses it.
AP_FALL_FOR_LOSS = 4.7


@dataclass(frozen=True)
class Cut:
    """A cut network: its kept sets and its saved state for `Workbench.load`."""

    kept: dict[str, Kept]
    saved: Any


@dataclass
class BudgetSearch:
    """Search by budget; `run` returns the kept set of every module.

    Attributes:
        bench: the whole network, without gates.
        prices: of each module at each of its widths, and with two budgets also in parameters.
        decoder_layers: number of those that are left, for the trials; None if the search drops none.
        base_ap: mAP in [0, 1] of the whole split before the search.
        keep_params: fraction of the parameters to keep, with two budgets.
        powers: of the damages, in the order in which they are tried.
        on_trial: called with each new trial.
        replayed: earlier trials of a resumed search, in order; they are not measured again.
        effort: that of a search that began before this one; None begins now.
        progress: called after each module with its name and cut width (None after predicting its damage).
        trials: all trials, including replayed ones.
        damages: predictions of the last `run` for each module at each of its widths.
    """

    bench: Workbench
    prices: Prices
    base_ap: float
    keep_params: float | None = None
    powers: Sequence[float] = POWERS
    on_trial: Callable[[Trial], None] = lambda trial: None
    replayed: Sequence[Trial] = ()
    decoder_layers: int | None = None
    effort: Effort | None = None
    progress: Callable[[str, int | None], Any] = lambda name, width: None
    trials: list[Trial] = field(default_factory=list)
    damages: Tables = field(default_factory=dict)

    def run(
        self, keep: float | None, threshold_ap: float = 0.0, below: float | None = None
    ) -> tuple[dict[str, Kept], Trial | None]:
        """Cut to the fraction `keep` of the cost, or (None) as far as mAP stays at or above `threshold_ap`.

        With `below`, only trials that keep less than this fraction of the cost pass.

        Returns:
            The kept sets and the chosen trial; all channels and None if no trial passed.

        Raises:
            UserError: one unit of every module costs more than `keep`, or `replayed` belongs to another search.
        """
        if keep is not None:
            return next(self.run_each([keep]))
        self._begin(ATTENTION_WIDTHS_MEASURED)
        best, cut = self._least_that_passes(threshold_ap, below)
        return self._show(best, cut), best

    def run_each(self, keeps: Sequence[float]) -> Iterator[tuple[dict[str, Kept], Trial]]:
        """Cut to one fraction of the cost after the other and yield the kept sets and the chosen trial of each.

        Only the first fraction tries all powers; the others take its best one. Where the widths remove modules, those
        for the same fraction that remove none are tried, too: predicted damages of removed modules are often too small.

        Raises:
            UserError: one unit of every module costs more than a fraction, or `replayed` belongs to another search.
        """
        for keep in keeps:
            self.prices.check(keep)
        # With a given fraction there are few trials and the prediction matters more, so every width is measured.
        self._begin(None)
        powers = self.powers if self.base_ap > 0 else self.powers[:1]  # an mAP of 0 cannot choose
        for keep in keeps:
            best, cut = self._or_without_removals(keep, *self._best_power(keep, powers))
            powers = (best.power,)
            yield self._show(best, cut), best

    def _begin(self, attention_widths: int | None) -> None:
        self._past = deque(self.replayed)
        self._effort = self.effort or Effort(self.bench.counter, self.replayed)
        self._orders, self.damages = self._predict(attention_widths)

    def _show(self, best: Trial | None, cut: Cut | None) -> dict[str, Kept]:
        """Put the network into the state of a trial, unpruned for None, and return its kept sets."""
        if best is None or cut is None:  # a replayed trial has no cut
            return self._cut(self._whole if best is None else best.widths)
        self.bench.load(cut.saved)
        return cut.kept

    @property
    def _whole(self) -> dict[str, int]:
        return {name: module.width for name, module in self.bench.modules.items()}

    def _best_power(self, keep: float, powers: Sequence[float]) -> tuple[Trial, Cut | None]:
        """Return the trial with the greatest mAP among `powers`, and its cut."""
        best: Trial | None = None
        best_cut: Cut | None = None
        for power in powers:
            widths = distributed.on_main(functools.partial(self._allocate, keep, power))
            trial, cut = self._trial(keep, power, widths)
            if best is None or trial.full_ap > best.full_ap:
                best, best_cut = trial, cut
        assert best is not None
        return best, best_cut

    def _or_without_removals(self, keep: float, best: Trial, cut: Cut | None) -> tuple[Trial, Cut | None]:
        """Return the better of a trial that removes modules and one of the same power that removes none."""
        if all(best.widths.values()):
            return best, cut
        widths = distributed.on_main(functools.partial(self._allocate_without_removals, keep, best.power))
        if widths is None:
            return best, cut
        other, other_cut = self._trial(keep, best.power, widths)
        return (other, other_cut) if other.full_ap > best.full_ap else (best, cut)

    def _least_that_passes(self, threshold_ap: float, below: float | None) -> tuple[Trial | None, Cut | None]:
        """Return the trial with the least kept fraction that passes, and its cut; None if none passes.

        Each trial narrows the range of fractions; `_guess` chooses the next one. Widths that were measured before need
        no evaluation. Where decoder layers are dropped, the first trial is that of the others unpruned.
        """
        fails = self.prices.kept_fraction({name: min(table) for name, table in self.prices.costs.items()})
        passes = unpruned = self.prices.kept_fraction(self._whole)
        best: Trial | None = None
        best_cut: Cut | None = None
        if below is not None and unpruned >= below:
            passes = below
        elif self.prices.dropped and self.base_ap >= threshold_ap:
            best, _ = self._trial(unpruned, self.powers[0], self._whole)
        allowed = self.base_ap - threshold_ap
        losses: dict[float, float] = {}
        evaluations = 0
        while evaluations < EVALUATIONS and passes - fails > PRECISION:
            keep, widths = distributed.on_main(functools.partial(self._next, losses, allowed, fails, passes))
            if not fails < keep < passes:
                break  # the bounds are adjacent floats
            if widths == self._whole:
                passes = keep  # nothing is removed, so no trial is needed
                continue
            trial, cut = self._trial_of(widths), None
            if trial is None:
                trial, cut = self._trial(keep, self.powers[0], widths)
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
        return keep, self._allocate(keep, self.powers[0])

    def _guess(self, losses: Mapping[float, float], allowed: float, fails: float, passes: float) -> float:
        """Return the kept fraction between `fails` and `passes` that should lose just under the allowed mAP.

        Damage estimates the rise of the loss, so the mAP loss is taken to be proportional to it: with a typical factor
        before the first trial, then with that of the trial nearest to the allowed loss. With two or more trials it is a
        power of the damage, fitted to the two nearest.

        Args:
            losses: lost mAP of each trial, by its damage.
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
            exponent = min(max(exponent, 1 / STEEPEST), STEEPEST)  # trials with similar losses give no slope
        target = damage * (AIM * allowed / loss) ** (1 / exponent)
        margin = (passes - fails) / 8
        low, high = fails + margin, passes - margin
        while high - low > PRECISION / 8:
            keep = (low + high) / 2
            if sum_of(self.damages, self._allocate(keep, self.powers[0])) > target:
                low = keep
            else:
                high = keep
        return high

    def _allocate(self, keep: float, power: float, least_width: int = 0) -> dict[str, int]:
        """Return widths that cost at most the fraction `keep` of the whole, and `keep_params` of its parameters.

        Where no user of a shared cost is left, the other modules may cost more instead.

        Raises:
            ValueError: no widths from `least_width` on do.
        """
        gone: list[Shared] = []
        while True:
            widths = self._divide(self.prices.budget(keep, gone), power, least_width)
            found = self.prices.shared_gone(widths)
            if found == gone:
                return widths
            gone = found

    def _divide(self, budget: Budget, power: float, least_width: int) -> dict[str, int]:
        costs = {name: {w: c for w, c in table.items() if w >= least_width} for name, table in budget.costs.items()}
        damages = _same_widths(self.damages, costs)
        if self.prices.params is None or self.keep_params is None:
            return allocate(damages, costs, budget.limit, power)
        params = self.prices.params.budget(self.keep_params)
        budgets = Budget(costs, budget.limit), Budget(_same_widths(params.costs, costs), params.limit)
        return allocate_both(damages, budgets, power)

    def _allocate_without_removals(self, keep: float, power: float) -> dict[str, int] | None:
        with contextlib.suppress(ValueError):
            return self._allocate(keep, power, least_width=1)
        return None

    def _kept_params(self, widths: Mapping[str, int]) -> float | None:
        params = self.prices.params
        return None if params is None else params.kept_fraction(widths)

    def _trial_of(self, widths: Mapping[str, int]) -> Trial | None:
        """Return the trial with these widths, or None."""
        return next((trial for trial in self.trials if trial.widths == widths), None)

    def _trial(self, keep: float, power: float, widths: dict[str, int]) -> tuple[Trial, Cut | None]:
        """Return the next replayed trial, or a new one with these widths, and its cut if one was made.

        The same widths are measured only once.
        """
        cut = None
        if self._past:
            trial = self._past.popleft()
            self._check_replayed(trial, power)
        else:
            known = self._trial_of(widths)
            if known is not None:
                ap = known.full_ap
            elif widths == self._whole:
                ap = self.base_ap
            else:
                kept, ap = self._cut(widths), self.bench.full_ap()
                cut = Cut(kept, self.bench.save())
            trial = Trial(
                keep, power, widths, ap, self.prices.kept_fraction(widths), self.keep_params, self._kept_params(widths),
                self.decoder_layers, **self._effort.so_far(),
            )  # fmt: skip
            self.on_trial(trial)
        self.trials.append(trial)
        return trial, cut

    def _check_replayed(self, trial: Trial, power: float) -> None:
        """Raise a `UserError` for a trial that cannot come from this search.

        Its widths may differ from those predicted now, because damages are rounded differently on other devices.
        """
        known = list(trial.widths) == list(self.prices.costs) and all(
            width in self.prices.costs[name] for name, width in trial.widths.items()
        )
        if not known or trial.power != power:
            raise UserError(f"journal: found a trial (power {trial.power:g}) of other modules or widths than these")
        self._check_kept("cost", trial.keep, trial.kept_fraction, self.prices.kept_fraction(trial.widths))
        params = self._kept_params(trial.widths)
        if trial.keep_params != self.keep_params or (trial.kept_params is None) != (params is None):
            raise UserError(
                f"journal: found a trial with keep_params {trial.keep_params} and kept_params {trial.kept_params}, "
                f"expected keep_params {self.keep_params} and kept_params {params}"
            )
        if trial.keep_params is not None and trial.kept_params is not None and params is not None:
            self._check_kept("parameters", trial.keep_params, trial.kept_params, params)

    def _check_kept(self, what: str, keep: float, kept: float, expected: float) -> None:
        if abs(expected - kept) > ROUNDING or expected > keep + ROUNDING:
            raise UserError(
                f"journal: found a trial that keeps {kept:g} of the {what}, expected {expected:g}, the {what} "
                f"of its widths, and at most {keep:g}"
            )

    def _predict(self, attention_widths: int | None) -> tuple[dict[str, Order], Tables]:
        """Return the channel order of each module, and its damage at each width while all others are whole.

        Args:
            attention_widths: number of widths of an attention to measure; None for all.
        """
        self.bench.reset()
        fits = DividedFits[Prediction](self.bench.modules)
        for name, module in self.bench.modules.items():
            self.bench.begin(name)
            to_measure = widths_to_measure(module, list(self.prices.costs[name]), attention_widths)
            fits.add(name, self.bench.predict(name, to_measure), len(to_measure))
            self.progress(name, None)
        found = fits.results()
        damages = {name: between(of_widths, list(self.prices.costs[name])) for name, (_, of_widths) in found.items()}
        return {name: order for name, (order, _) in found.items()}, damages

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


def cuts_at_most(budgets: int, min_units: int) -> int:
    """Return the most cuts that `BudgetSearch.run_each` makes for so many budgets."""
    return len(POWERS) + budgets - 1 + (0 if min_units else budgets)


def _same_widths(tables: Tables, others: Tables) -> dict[str, dict[int, float]]:
    """Return the entries of tables for the widths of the others."""
    return {name: {width: tables[name][width] for width in table} for name, table in others.items()}


def widths_to_measure(module: PrunableModule, widths: Sequence[int], attention_widths: int | None) -> list[int]:
    """Return the widths to measure: `attention_widths` of an attention with queries, else all but the whole width.

    Width 0 is always measured; it is not one of `attention_widths`.
    """
    *below, _ = widths
    if below and not below[0]:
        return [0, *widths_to_measure(module, widths[1:], attention_widths)]
    count = len(below) if attention_widths is None else attention_widths
    if "query" not in module.parts or len(below) <= count:
        return below
    return sorted({below[place * len(below) // count] for place in range(count)})
