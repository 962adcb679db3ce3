"""Allocate two budgets at once: choose the widths of all modules with the least predicted damage within both.

An integer program chooses one width for each module. HiGHS (`scipy.optimize.milp`) solves it.

One budget keeps the simpler rule of `pruning.allocation.allocate`. Its sums of damages are above those of HiGHS, on one
CPU thread, by

- demo, transformer (15 modules of 17 widths): 0.9 % on average, 11 % at worst, in 12 ms instead of 110 ms;
- demo, detector (21 modules of 16 widths): 0.7 %, 4.9 %, 15 ms instead of 125 ms; both for 13 fractions from 0.35 to
  0.95, three powers, with and without width 0;
- random smooth tables, 46 modules of 17 to 33 widths: 0.5 %, 5.2 %, 49 ms instead of 0.33 s;
- random smooth tables, 46 modules of 16 to 256 widths: 0.1 %, 1.2 %, 42 ms instead of 0.75 s.

That is less than the error of the predicted damages, and `--map_tol` allocates dozens of times. Two budgets take HiGHS
70 ms, 160 ms, 0.9 s and 2.1 s on average.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from pruning.allocation import Budget, Tables, check_damages, spend_rest, sum_of
from util.logging import show
from util.native_output import without_native_stdout

GAP = 1e-4  # relative distance to the optimum at which HiGHS may stop
NODES = 2000  # of its search tree at most; unlike a time limit it gives the same widths on each run
# HiGHS may exceed a limit by 1e-6 of it. Widths that exceed a budget are computed again with lower limits.
MARGINS = (0.0, 1e-5)


def allocate_both(damages: Tables, budgets: tuple[Budget, Budget], power: float = 1.0) -> dict[str, int]:
    """Return widths with about the least sum of damage ** power that cost at most both `budgets`.

    Raises:
        NonFiniteLossError: a damage is not finite.
        ValueError: no widths do.
    """
    check_damages(damages)
    first, second = budgets
    start = least_within(second.costs, first)
    if not (first.fits(start) and second.fits(start)):
        raise ValueError(f"found budgets of {first.limit:g} and {second.limit:g}, expected some that can be met")
    start = spend_rest(start, damages, budgets, power)
    powers = {name: {width: damage**power for width, damage in table.items()} for name, table in damages.items()}
    return spend_rest(choose(powers, budgets, start), damages, budgets, power)


def least_within(costs: Tables, budget: Budget) -> dict[str, int]:
    """Return the widths with about the least sum of `costs` within `budget`, which some widths must fit."""
    names = budget.costs
    least = {name: min(table, key=lambda w: (table[w], names[name][w])) for name, table in costs.items()}
    if budget.fits(least):
        return least
    cheapest = {name: min(table, key=lambda w: (table[w], costs[name][w])) for name, table in names.items()}
    above = {name: {w: cost - table[least[name]] for w, cost in table.items()} for name, table in costs.items()}
    return choose(above, [budget], cheapest, "cost")


def choose(objective: Tables, budgets: Sequence[Budget], start: dict[str, int], of: str = "damage") -> dict[str, int]:
    """Return widths within all `budgets` with about the least sum of `objective`, whose values are not negative.

    Args:
        start: widths within all budgets, which are returned if no better ones are found.
        of: what the `objective` is, for a warning if the widths may not be the best.
    """
    most = sum_of(objective, start)
    if not most:
        return start
    choices = _choices(objective, budgets, start)
    for margin in MARGINS:
        widths, is_proven = _solve(objective, budgets, choices, most, margin)
        if widths is not None and all(budget.fits(widths) for budget in budgets):
            if not is_proven:
                _warn_once(of)
            return widths if sum_of(objective, widths) < most else start
    _warn_once(of)
    return start


@functools.cache
def _warn_once(of: str) -> None:
    text = f"two budgets: the solver could not prove that no widths have less {of} than the chosen ones, which fit"
    show([(logging.WARNING, text)])


def _choices(objective: Tables, budgets: Sequence[Budget], start: dict[str, int]) -> dict[str, list[int]]:
    """Return the widths of each module with which alone the sums can be within the budgets and below that of `start`.

    What is left has numbers of one order, which HiGHS needs.
    """
    most, spare = sum_of(objective, start), [_spare(budget) for budget in budgets]

    def is_affordable(name: str, width: int) -> bool:
        tables = [budget.costs[name] for budget in budgets]
        return all(table[width] - min(table.values()) <= rest for table, rest in zip(tables, spare, strict=True))

    choices = {}
    for name, table in objective.items():
        choices[name] = [
            width
            for width, value in table.items()
            if width == start[name] or (value <= most and is_affordable(name, width))
        ]
    return choices


def _spare(budget: Budget) -> float:
    """Return what a budget leaves beyond the cheapest widths."""
    return budget.limit - sum(min(table.values()) for table in budget.costs.values())


def _solve(
    objective: Tables, budgets: Sequence[Budget], choices: dict[str, list[int]], most: float, margin: float
) -> tuple[dict[str, int] | None, bool]:
    """Return the best of the `choices` within the fraction 1 - `margin` of each budget's spare, None if not found.

    They may exceed it by the tolerance of HiGHS. Also return whether they are proven to be the best within `GAP`.
    """
    sizes = [len(widths) for widths in choices.values()]
    is_of_module = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    constraints = [LinearConstraint(is_of_module, 1, 1)]
    for budget in budgets:
        spare = _spare(budget) or 1.0
        extra = [
            (budget.costs[name][width] - min(budget.costs[name].values())) / spare
            for name, widths in choices.items()
            for width in widths
        ]
        constraints.append(LinearConstraint(np.array(extra), -np.inf, 1.0 - margin))
    values = np.array([objective[name][width] / most for name, widths in choices.items() for width in widths])
    options = {"mip_rel_gap": GAP, "node_limit": NODES}
    with without_native_stdout():  # some versions of HiGHS print messages for their developers
        found = milp(values, constraints=constraints, bounds=Bounds(0, 1), integrality=1, options=options)
    if found.x is None:
        return None, False
    parts = np.split(found.x, np.cumsum(sizes)[:-1])
    best = {name: widths[np.argmax(part)] for (name, widths), part in zip(choices.items(), parts, strict=True)}
    return best, found.status == 0
