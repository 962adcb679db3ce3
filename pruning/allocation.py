"""Allocation of a budget: the widths of all modules with the least predicted damage that the budget pays for.

Damages and costs are tables: `table[module][width]` for each width that a module may have, in ascending order; the last
one is the whole module, which does no damage. Costs need not be proportional to the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from models.prunable import PrunableModule
from pruning.moments import TINY
from util.errors import UserError

WIDTHS_TRIED = 16  # of each module, at least, unless it has fewer: more where they do not divide evenly

Tables = Mapping[str, Mapping[int, float]]


def allocate(damages: Tables, costs: Tables, budget: float, power: float = 1.0) -> dict[str, int]:
    """Widths with a small sum of damage ** power that together cost at most `budget`.

    Raises:
        ValueError: the cheapest widths cost more than that.
    """
    widths = at_lowest_price(damages, costs, budget, power)
    return spend_rest(widths, damages, costs, budget, power)


def at_lowest_price(damages: Tables, costs: Tables, budget: float, power: float) -> dict[str, int]:
    """Widths that the lowest price of a unit of cost gives which keeps them within `budget`.

    At a price each module takes the width with the least damage ** power + price * cost. Nothing that costs as little
    does less damage than the modules then do together (Everett 1963).

    Raises:
        ValueError: at no price are they that cheap.
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


def spend_rest(
    widths: Mapping[str, int], damages: Tables, costs: Tables, budget: float, power: float
) -> dict[str, int]:
    """Widen module after module by one width, the one that gains most for its cost first, as far as `budget` lasts."""
    widths = dict(widths)
    while True:
        rest, best = budget - sum_of(costs, widths), None
        for name, damage in damages.items():
            wider = min((w for w in damage if w > widths[name]), default=None)
            if wider is None or (cost := costs[name][wider] - costs[name][widths[name]]) > rest:
                continue
            gain = (damage[widths[name]] ** power - damage[wider] ** power) / cost
            if gain >= 0 and (best is None or gain > best[0]):
                best = (gain, name, wider)
        if best is None:
            return widths
        widths[best[1]] = best[2]


def sum_of(tables: Tables, widths: Mapping[str, int]) -> float:
    """Sum over the modules of what a table holds for their widths."""
    return sum(tables[name][width] for name, width in widths.items())


def linear_costs(
    modules: Mapping[str, PrunableModule], per_channel: Mapping[str, float], units: Mapping[str, int]
) -> dict[str, dict[int, float]]:
    """Cost tables of modules whose channels all cost the same; the widths are multiples of `units`, or whole."""
    return {
        name: {width: per_channel[name] * width for width in widths_tried(module.width, units[name])}
        for name, module in modules.items()
    }


def widths_tried(width: int, unit: int) -> list[int]:
    """One unit, multiples of it about evenly spread, and the module's own width; ascending."""
    step = unit * max(1, width // unit // WIDTHS_TRIED)
    return sorted({min(unit, width), *range(step, width, step), width})


def check_affordable(keep: float, costs: Tables, total_cost: float) -> None:
    """Raise a `UserError` if the least widths cost more than the fraction `keep` of the whole, `total_cost`."""
    least = total_cost - sum(max(table.values()) - min(table.values()) for table in costs.values())
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
