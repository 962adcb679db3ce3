"""A search by budget: so much of the transformer may stay; mAP is only measured to check.

Every module's damage at every width is predicted from calibration moments and gradients with all others whole. Widths
then minimise the sum of damages for the cost, and the detector is cut and reconstructed module by module in network
order, each on what the cut modules before it give.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.prunable import PrunableModule
from pruning.journal import Effort, Trial
from pruning.kept import Kept
from pruning.moments import TINY
from pruning.search import Workbench
from pruning.selection import Order
from util import distributed
from util.errors import UserError

# Damages add up where they are small. Where much is cut they compound, and their roots predict better; which power
# is best is found by measuring mAP.
POWERS = (0.5, 1.0, 0.25)
EVALUATIONS = 4  # of mAP at most when the least budget is looked for; widths measured before are none
PRECISION = 0.01  # of the whole cost, to which that budget is then known
WIDTHS_TRIED = 16  # of each module, at least, unless it has fewer: more where they do not divide evenly
# The damage of queries takes a forward for each width, so that few are measured and those between follow.
ATTENTION_WIDTHS_MEASURED = 4
STEEPEST = 4.0  # power of the damage that mAP may be taken to fall by
MIN_LOSS = 1e-4  # of mAP: less is taken for this much, since it tells nothing of a slope
AIM = 0.97  # of the mAP that may be lost, so that a prediction a little off still passes
ROUNDING = 1e-9  # of the whole cost
NEAR = 0.1  # of the same: who comes as near to losing it all has found the budget
# mAP falls by this many times the fraction that the loss is predicted to rise by: 4.2 to 5.0 times on the demo where 3
# to 30 % of its mAP are lost. Only the first trial hangs on it.
AP_FALL_FOR_LOSS = 4.7


@dataclass
class BudgetSearch:
    """One search by budget; `run` gives the kept set of every module.

    Attributes:
        bench: the network, whole, with no gates.
        cost_per_channel: of each module, in parameters or multiply-accumulates.
        total_cost: of the whole transformer.
        units: channels by which each module's width changes.
        base_ap: mAP in [0, 1] of the whole split before the search.
        on_trial: called with each new trial.
        replayed: trials of the same search that were made before, in order; they are not measured again.
        progress: called with the name of each module that is done with, and the width it was cut to; None where its
            damage was predicted.
        trials: those measured, replayed ones among them.
    """

    bench: Workbench
    cost_per_channel: Mapping[str, float]
    total_cost: float
    units: Mapping[str, int]
    base_ap: float
    on_trial: Callable[[Trial], None] = lambda trial: None
    replayed: Sequence[Trial] = ()
    progress: Callable[[str, int | None], Any] = lambda name, width: None
    trials: list[Trial] = field(default_factory=list)
    _damages: dict[str, dict[int, float]] = field(default_factory=dict)
    _orders: dict[str, Order] = field(default_factory=dict)
    _measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    _last_cut: tuple[tuple[int, ...], Any] | None = None

    def run(self, keep: float | None, threshold_ap: float = 0.0) -> tuple[dict[str, Kept], Trial | None]:
        """Cut to the fraction `keep` of the cost, or (None) as far as mAP is not below `threshold_ap`.

        Returns:
            The kept sets and the trial that was taken; everything and None if no trial was good enough.

        Raises:
            UserError: one unit of every module costs more than that, or `replayed` are trials of another search.
        """
        if keep is not None:
            check_affordable(keep, self.total_cost, self.bench.modules, self.cost_per_channel, self.units)
        self._past, self.effort = deque(self.replayed), Effort(self.bench.counter, self.replayed)
        if not self._damages:
            # A fraction that is asked for is met in few trials: more hangs on the prediction, so nothing is guessed.
            self._predict_damages(ATTENTION_WIDTHS_MEASURED if keep is None else None)
        self._best_cut: tuple[tuple[int, ...], Any] | None = None
        best = self._least_that_passes(threshold_ap) if keep is None else self._best_power(keep)
        return self._restore(self._whole if best is None else best.widths), best

    @property
    def _whole(self) -> dict[str, int]:
        return {name: module.width for name, module in self.bench.modules.items()}

    def _best_power(self, keep: float) -> Trial:
        best: Trial | None = None
        for power in POWERS:
            trial = self._trial(keep, power, distributed.on_main(functools.partial(self.allocate, keep, power)))
            if best is None or trial.full_ap > best.full_ap:
                best = trial
                self._keep_cut(trial)
        assert best is not None
        return best

    def _keep_cut(self, trial: Trial) -> None:
        """Keep the cut of a trial that is the best so far, if it was the last to be made."""
        if self._last_cut is not None and self._last_cut[0] == tuple(trial.widths.values()):
            self._best_cut = self._last_cut

    def _least_that_passes(self, threshold_ap: float) -> Trial | None:
        """Narrow the range of kept fractions; whatever passes with less is the better one. None if nothing passes.

        What mAP a fraction will give is predicted from the trials before it, see `_guess`. A fraction whose widths are
        known narrows the range without an evaluation.
        """
        fails, passes = self._cost_of(self._least_widths()) / self.total_cost, 1.0
        best: Trial | None = None
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
            trial = next((trial for trial in self.trials if trial.widths == widths), None)
            if trial is None:
                trial = self._trial(keep, POWERS[0], widths)
                keep, evaluations = trial.keep, evaluations + 1
            losses[self._total_damage(trial.widths)] = self.base_ap - trial.full_ap
            if trial.full_ap >= threshold_ap:
                best, passes = trial, keep
                self._keep_cut(trial)
            else:
                fails = keep
            if allowed > 0 and 0 <= trial.full_ap - threshold_ap <= NEAR * allowed:
                break
        return best

    def _next(
        self, losses: Mapping[float, float], allowed: float, fails: float, passes: float
    ) -> tuple[float, dict[str, int]]:
        keep = self._guess(losses, allowed, fails, passes)
        return keep, self.allocate(keep, POWERS[0])

    def _guess(self, losses: Mapping[float, float], allowed: float, fails: float, passes: float) -> float:
        """The kept fraction between two others with which mAP should fall by what it may.

        Damage is an estimate of what the loss rises by, so that mAP is taken to fall in proportion to it, as it does in
        other networks before any trial, or by the power of it that the two trials nearest to what is allowed tell.

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
            exponent = min(max(exponent, 1 / STEEPEST), STEEPEST)  # trials that lose alike tell no slope
        target = damage * (AIM * allowed / loss) ** (1 / exponent)
        margin = (passes - fails) / 8
        low, high = fails + margin, passes - margin
        while high - low > PRECISION / 8:
            keep = (low + high) / 2
            if self._total_damage(self.allocate(keep, POWERS[0])) > target:
                low = keep
            else:
                high = keep
        return high

    def _total_damage(self, widths: Mapping[str, int]) -> float:
        return sum(self._damages[name][width] for name, width in widths.items())

    def _trial(self, keep: float, power: float, widths: dict[str, int]) -> Trial:
        """The next trial of the search before, or a new one with these widths."""
        trial = self._past.popleft() if self._past else None
        if trial is None:
            ap, kept_fraction = self._ap_at(widths), self._cost_of(widths) / self.total_cost
            trial = Trial(keep, power, widths, ap, kept_fraction, **self.effort.so_far())
            self.on_trial(trial)
        else:
            self._check_replayed(trial, power)
        self._measured[tuple(trial.widths.values())] = trial.full_ap
        self.trials.append(trial)
        return trial

    def _check_replayed(self, trial: Trial, power: float) -> None:
        """Raise a `UserError` for a trial that this search cannot have made.

        Its widths need not be those that would be predicted now: damages differ by rounding from device to device.
        """
        known = list(trial.widths) == list(self._damages) and all(
            width in self._damages[name] for name, width in trial.widths.items()
        )
        if not known or trial.power != power:
            raise UserError(f"journal: found a trial (power {trial.power:g}) of other modules or widths than these")
        cost = self._cost_of(trial.widths) / self.total_cost
        if abs(cost - trial.kept_fraction) > ROUNDING or cost > trial.keep + ROUNDING:
            raise UserError(
                f"journal: found a trial that keeps {trial.kept_fraction:g} of the cost, expected {cost:g}, which its "
                f"widths cost, and at most {trial.keep:g}"
            )

    def _ap_at(self, widths: Mapping[str, int]) -> float:
        """mAP of the whole split with these widths, measured once."""
        known = self._measured.get(tuple(widths.values()))
        if known is None:
            kept = self._cut(widths)
            known = self.bench.full_ap()
            self._last_cut = tuple(widths.values()), (kept, self.bench.save())
        return known

    def _predict_damages(self, attention_widths: int | None) -> None:
        """Order of each module's channels, and its damage at each of its widths, all others whole."""
        self.bench.reset()
        for name, module in self.bench.modules.items():
            self.bench.begin(name)
            order = self._orders[name] = self.bench.rank(name)
            widths = self._widths(name)
            measured = {
                w: self.bench.set_kept(name, order.kept(w)) for w in self._widths_to_measure(name, attention_widths)
            }
            self._damages[name] = between(measured, widths)
            # The next module stands behind this one whole.
            self.bench.set_kept(name, order.kept(module.width))
            self.progress(name, None)

    def _widths_to_measure(self, name: str, attention_widths: int | None) -> list[int]:
        """The widths whose damage is measured: that many of an attention with queries, else all: moments are enough."""
        *widths, _ = self._widths(name)
        count = len(widths) if attention_widths is None else attention_widths
        if "query" not in self.bench.modules[name].parts or len(widths) <= count:
            return widths
        places = [place * len(widths) // count for place in range(count)]
        return sorted({widths[place] for place in places})

    def _widths(self, name: str) -> list[int]:
        """One unit, multiples of it about evenly spread, and the module's own width; ascending."""
        width, unit = self.bench.modules[name].width, self.units[name]
        step = unit * max(1, width // unit // WIDTHS_TRIED)
        return sorted({min(unit, width), *range(step, width, step), width})

    def _least_widths(self) -> dict[str, int]:
        return {name: min(self._widths(name)) for name in self.bench.modules}

    def _cost_of(self, widths: Mapping[str, int]) -> float:
        gone = (self.bench.modules[n].width - width for n, width in widths.items())
        return self.total_cost - sum(self.cost_per_channel[n] * less for n, less in zip(widths, gone, strict=True))

    def allocate(self, keep: float, power: float) -> dict[str, int]:
        """Widths of the least sum of damage ** power whose cost is at most `keep` of the whole.

        A Lagrange multiplier prices the cost; each module then takes the width that is best for itself (Everett 1963).
        What the price leaves over goes to the modules that gain most for their cost.

        Raises:
            UserError: there are no such widths.
        """
        budget = keep * self.total_cost
        check_affordable(keep, self.total_cost, self.bench.modules, self.cost_per_channel, self.units)
        low, high = 1e-30, 1e30
        for _ in range(200):
            price = (low * high) ** 0.5
            if self._cost_of(self._at_price(price, power)) > budget:
                low = price
            else:
                high = price
        return self._spend_rest(self._at_price(high, power), budget, power)

    def _at_price(self, price: float, power: float) -> dict[str, int]:
        widths = {}
        for name, (choices, damages) in self._tables.items():
            cheapest = np.argmin(damages**power + price * self.cost_per_channel[name] * choices)
            widths[name] = int(choices[cheapest])
        return widths

    @functools.cached_property
    def _tables(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Widths of each module and their damages."""
        return {name: (np.array([*damages]), np.array([*damages.values()])) for name, damages in self._damages.items()}

    def _spend_rest(self, widths: dict[str, int], budget: float, power: float) -> dict[str, int]:
        while True:
            rest, best = budget - self._cost_of(widths), None
            for name, damages in self._damages.items():
                wider = min((w for w in damages if w > widths[name]), default=None)
                if wider is None or (cost := (wider - widths[name]) * self.cost_per_channel[name]) > rest:
                    continue
                gain = (damages[widths[name]] ** power - damages[wider] ** power) / cost
                if gain >= 0 and (best is None or gain > best[0]):
                    best = (gain, name, wider)
            if best is None:
                return widths
            widths = {**widths, best[1]: best[2]}

    def _restore(self, widths: Mapping[str, int]) -> dict[str, Kept]:
        """Bring the network to these widths: to the saved cut, or if that is another (after a replay) to a new one."""
        if self._best_cut is None or self._best_cut[0] != tuple(widths.values()):
            return self._cut(widths)
        _, (kept, saved) = self._best_cut
        self.bench.load(saved)
        return kept

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


def check_affordable(
    keep: float,
    total_cost: float,
    modules: Mapping[str, PrunableModule],
    cost_per_channel: Mapping[str, float],
    units: Mapping[str, int],
) -> None:
    """Raise a `UserError` if one unit of every module costs more than the fraction `keep` of the whole."""
    gone = (cost_per_channel[name] * max(0, module.width - units[name]) for name, module in modules.items())
    least = total_cost - sum(gone)
    if least > keep * total_cost:
        raise UserError(
            f"--keep {keep:g}: found that one unit of every module keeps {least / total_cost:.3f} of the transformer's "
            "cost, expected at least that"
        )


def between(measured: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """Damage at `widths`, the last of which is whole and does none, from the damage at some of them.

    Its logarithm is taken to be linear in between, and behind the last measured width the damage itself.
    """
    known = sorted(measured)
    damages = {widths[-1]: 0.0, **measured}
    if not known:
        return damages
    logs = [math.log(max(measured[width], TINY)) for width in known]
    last, whole = known[-1], widths[-1]
    for width in widths[:-1]:
        if width in measured:
            continue
        if width > last:
            damages[width] = measured[last] * (whole - width) / (whole - last)
        else:
            damages[width] = math.exp(np.interp(width, known, logs))
    return {width: damages[width] for width in widths}
