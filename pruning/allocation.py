"""Allocate a budget: choose the widths of all modules with little predicted damage within the budget.

Damages and costs are tables: `table[module][width]` for each allowed width, in ascending order. The last width is the
whole module, with damage 0. Costs need not be proportional to the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pruning.moments import TINY
from util.errors import NonFiniteLossError

WIDTHS_TRIED = 16  # at least, of each module, if it has as many
ROUNDING = 1e-9  # of the whole cost, by which a budget may be missed

Tables = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Budget:
    """A limit on the sum of the `costs` of the chosen widths."""

    costs: Tables
    limit: float

    def fits(self, widths: Mapping[str, int]) -> bool:
        """Return whether the widths cost at most the limit."""
        return sum_of(self.costs, widths) <= self.limit


@dataclass(frozen=True)
class Shared:
    """A cost that several modules share: it is gone where all `users` have width 0, and only then."""

    cost: float
    users: tuple[str, ...]

    def is_gone(self, widths: Mapping[str, int]) -> bool:
        """Return whether no module uses it."""
        return not any(widths[name] for name in self.users)


def allocate(damages: Tables, costs: Tables, budget: float, power: float = 1.0) -> dict[str, int]:
    """Return widths with a small sum of damage ** power and a total cost of at most `budget`.

    Raises:
        NonFiniteLossError: a damage is not finite.
        ValueError: the cheapest widths cost more.
    """
    check_damages(damages)
    widths = at_lowest_price(damages, costs, budget, power)
    return spend_rest(widths, damages, [Budget(costs, budget)], power)


def check_damages(damages: Tables) -> None:
    """Raise a `NonFiniteLossError` that names the first module with a damage that is not finite."""
    for name, table in damages.items():
        for width, damage in table.items():
            if not math.isfinite(damage):
                raise NonFiniteLossError(f"calibration: the damage of {name} at width {width} is not finite")


def at_lowest_price(damages: Tables, costs: Tables, budget: float, power: float) -> dict[str, int]:
    """Return the widths for the lowest price per unit of cost at which they fit `budget`.

    Each module gets the width with the least damage ** power + price * cost. No widths of the same or a lower total
    cost have a smaller sum (Everett 1963).

    Raises:
        ValueError: the widths do not fit at any price.
    """
    arrays = {
        name: (np.array([*damages[name].values()]) ** power, np.array([*costs[name].values()])) for name in damages
    }
    choices = {name: list(table) for name, table in damages.items()}

    def at(price: float) -> dict[str, int]:
        return {name: choices[name][np.argmin(damage + price * cost)] for name, (damage, cost) in arrays.items()}

    low, high = 1e-30, 1e30
    for _ in range(200):
        price = (low * high) ** 0.5
        if sum_of(costs, at(price)) > budget:
            low = price
        else:
            high = price
    widths = at(high)
    if sum_of(costs, widths) > budget:
        raise ValueError(f"found a budget of {budget:g}, expected at least {sum_of(costs, widths):g}")
    return widths


def spend_rest(widths: Mapping[str, int], damages: Tables, budgets: Sequence[Budget], power: float) -> dict[str, int]:
    """Widen one module by one step at a time, the one with the largest gain per cost, while all `budgets` allow it.

    Costs are counted as fractions of the budgets.
    """
    widths = dict(widths)
    while True:
        rests, best = [budget.limit - sum_of(budget.costs, widths) for budget in budgets], None
        for name, damage in damages.items():
            wider = min((w for w in damage if w > widths[name]), default=None)
            if wider is None:
                continue
            costs = [budget.costs[name][wider] - budget.costs[name][widths[name]] for budget in budgets]
            if any(cost > rest for cost, rest in zip(costs, rests, strict=True)):
                continue
            gain = damage[widths[name]] ** power - damage[wider] ** power
            share = sum(cost / budget.limit for cost, budget in zip(costs, budgets, strict=True) if cost > 0)
            rate = gain / share if share else math.inf
            if gain >= 0 and (best is None or rate > best[0]):
                best = (rate, name, wider)
        if best is None:
            return widths
        widths[best[1]] = best[2]


def sum_of(tables: Tables, widths: Mapping[str, int]) -> float:
    """Return the sum over all modules of the table entries for their widths."""
    return sum(tables[name][width] for name, width in widths.items())


def widths_tried(width: int, unit: int, min_units: int = 1) -> list[int]:
    """Return one unit, evenly spaced multiples of it, and the whole width, ascending; also 0 if `min_units` is 0."""
    step = unit * max(1, width // unit // WIDTHS_TRIED)
    return sorted({min(min_units * unit, width), min(unit, width), *range(step, width, step), width})


def is_affordable(keep: float, least: float, total_cost: float) -> bool:
    """Return whether the least widths, which cost `least`, leave at most the fraction `keep` of `total_cost`."""
    return least <= (keep + ROUNDING) * total_cost


def rounded_up(fraction: float) -> str:
    """Return a fraction with three decimals, not less than it."""
    return f"{math.ceil(1000 * fraction - 1e-9) / 1000:.3f}"


def between(measured: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """Interpolate the damage at all `widths` from the measured ones; the last width is whole, with damage 0.

    Interpolation is linear in the logarithm of the damage, and in the damage itself beyond the last measured width.
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
