"""A search by budget: so much of the transformer may stay; mAP is only measured to check.

Every module's damage at every width is predicted from calibration moments and gradients with all others whole. Widths
then minimise the sum of damages for the cost, and the detector is cut and reconstructed module by module in network
order, each on what the cut modules before it give.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pruning.journal import Trial
from pruning.kept import Kept
from pruning.search import Workbench
from util.errors import UserError

# Damages add up where they are small. Where much is cut they compound, and their roots predict better; which power
# is best is found by measuring mAP.
POWERS = (0.5, 1.0, 0.25)
EVALUATIONS = 7  # of mAP when the least budget is looked for: it is then known to a hundredth of the whole
WIDTHS_TRIED = 16  # of each module when its damage is predicted


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
        progress: called with the name of each module that is done with, once for each sweep over them.
        trials: those measured, replayed ones among them.
    """

    bench: Workbench
    cost_per_channel: Mapping[str, float]
    total_cost: float
    units: Mapping[str, int]
    base_ap: float
    on_trial: Callable[[Trial], None] = lambda trial: None
    replayed: Sequence[Trial] = ()
    progress: Callable[[str], Any] = lambda name: None
    trials: list[Trial] = field(default_factory=list)
    _damages: dict[str, dict[int, float]] = field(default_factory=dict)
    _measured: dict[tuple[int, ...], float] = field(default_factory=dict)

    def run(self, keep: float | None, threshold_ap: float = 0.0) -> tuple[dict[str, Kept], Trial]:
        """Cut to the fraction `keep` of the cost, or (None) as far as mAP is not below `threshold_ap`.

        Raises:
            UserError: one unit of every module costs more than that, or `replayed` are trials of another search.
        """
        if keep is not None:
            self._check_affordable(keep, {name: min(self._widths(name)) for name in self.bench.modules})
        self._past = deque(self.replayed)
        self._damages = self._damages or self._predict_damages()
        if keep is not None:
            trials = [self._trial(keep, power) for power in POWERS]
            best = max(trials, key=lambda trial: trial.full_ap)
        else:
            best = self._least_that_passes(threshold_ap)
        return self._cut(best.widths), best

    def _least_that_passes(self, threshold_ap: float) -> Trial:
        """Halve the range of kept fractions; whatever passes with less is the better one."""
        fails, passes = self._cost_of(self._least_widths()) / self.total_cost, 1.0
        whole = {name: module.width for name, module in self.bench.modules.items()}
        best = Trial(1.0, POWERS[0], whole, self.base_ap, 1.0)
        for _ in range(EVALUATIONS):
            keep = (fails + passes) / 2
            trial = self._trial(keep, POWERS[0])
            if trial.full_ap >= threshold_ap:
                best, passes = trial, keep
            else:
                fails = keep
        return best

    def _trial(self, keep: float, power: float) -> Trial:
        widths = self.allocate(keep, power)
        trial = self._past.popleft() if self._past else None
        if trial is None:
            trial = Trial(keep, power, widths, self._ap_at(widths), self._cost_of(widths) / self.total_cost)
            self.on_trial(trial)
        elif (trial.keep, trial.power, trial.widths) != (keep, power, widths):
            raise UserError(f"journal: found a trial with {trial.keep:g} of the cost kept, expected {keep:g}")
        self._measured[tuple(widths.values())] = trial.full_ap
        self.trials.append(trial)
        return trial

    def _ap_at(self, widths: Mapping[str, int]) -> float:
        """mAP of the whole split with these widths, measured once."""
        known = self._measured.get(tuple(widths.values()))
        if known is None:
            self._cut(widths)
            known = self.bench.full_ap()
        return known

    def _predict_damages(self) -> dict[str, dict[int, float]]:
        """Damage of each module at up to `WIDTHS_TRIED` widths, all others whole."""
        damages: dict[str, dict[int, float]] = {}
        self.bench.reset()
        for name, module in self.bench.modules.items():
            self.bench.begin(name)
            # The whole module comes last, and is what the next one stands behind.
            damages[name] = {w: self.bench.set_kept(name, self.bench.choose(name, w)) for w in self._widths(name)}
            damages[name][module.width] = 0.0
            self.progress(name)
        return damages

    def _widths(self, name: str) -> list[int]:
        """One unit, multiples of it about evenly spread, and the module's own width; ascending."""
        width, unit = self.bench.modules[name].width, self.units[name]
        step = unit * max(1, width // unit // WIDTHS_TRIED)
        return sorted({min(unit, width), *range(step, width, step), width})

    def _least_widths(self) -> dict[str, int]:
        return {name: min(damages) for name, damages in self._damages.items()}

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
        self._check_affordable(keep, self._least_widths())
        low, high = 1e-30, 1e30
        for _ in range(200):
            price = (low * high) ** 0.5
            if self._cost_of(self._at_price(price, power)) > budget:
                low = price
            else:
                high = price
        return self._spend_rest(self._at_price(high, power), budget, power)

    def _check_affordable(self, keep: float, least: Mapping[str, int]) -> None:
        if self._cost_of(least) > keep * self.total_cost:
            raise UserError(
                f"--keep {keep:g}: found that one unit of every module keeps "
                f"{self._cost_of(least) / self.total_cost:.3f} of the transformer's cost, expected at least that"
            )

    def _at_price(self, price: float, power: float) -> dict[str, int]:
        return {
            name: min(damages, key=lambda w, name=name: self._damages[name][w] ** power
                      + price * self.cost_per_channel[name] * w)
            for name, damages in self._damages.items()
        }  # fmt: skip

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

    def _cut(self, widths: Mapping[str, int]) -> dict[str, Kept]:
        """Cut and reconstruct all modules in network order."""
        self.bench.reset()
        kept = {}
        for name in self.bench.modules:
            self.bench.begin(name)
            kept[name] = self.bench.choose(name, widths[name])
            self.bench.set_kept(name, kept[name])
            self.progress(name)
        return kept
