"""Allocation on tables alone: what is spent, what is bought, and how near that is to the best of all divisions."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from pruning.allocation import allocate, at_lowest_price, sum_of, widths_tried
from pruning.budget import POWERS
from pruning.cost_tables import Prices
from tests.pruning.samples import quick
from util.errors import UserError


def table(values):
    """The values of the widths from 1 on."""
    return dict(enumerate(values, start=1))


@st.composite
def problems(draw, convex=False):
    """Damages of up to three modules with up to five widths, costs, a budget and a power.

    Costs and budget are dyadic, so that their sums are exact. They rise with the width, but not evenly.
    """
    damages, costs = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        falls = draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
        falls = sorted(falls, reverse=True) if convex else falls
        damages[name] = table([sum(falls[width:]) for width in range(len(falls) + 1)])
        rises = [1.0 if convex else draw(st.integers(2, 20)) / 4 for _ in damages[name]]
        costs[name] = table(itertools.accumulate(rises))
    budget = draw(st.integers(1, 64)) / 64 * sum(max(costs[name].values()) for name in costs)
    return damages, costs, budget, draw(st.sampled_from(POWERS))


def least_cost(costs):
    return sum(min(table.values()) for table in costs.values())


def damage_of(widths, damages, power):
    return sum(damages[name][width] ** power for name, width in widths.items())


def all_divisions(damages):
    return [dict(zip(damages, widths, strict=True)) for widths in itertools.product(*damages.values())]


@quick
@given(problem=problems())
def test_an_allocation_never_costs_more_than_the_budget_and_leaves_no_room(problem):
    damages, costs, budget, power = problem
    if least_cost(costs) > budget:
        with pytest.raises(ValueError, match=r"found a budget of .*, expected at least"):
            allocate(damages, costs, budget, power)
        return
    widths = allocate(damages, costs, budget, power)
    assert sum_of(costs, widths) <= budget
    for name, width in widths.items():
        if width < max(damages[name]):
            assert sum_of(costs, {**widths, name: width + 1}) > budget


@quick
@given(problem=problems())
def test_nothing_as_cheap_does_less_damage_than_what_a_price_buys(problem):
    """Everett's theorem; what is left over is spent afterwards, and only lowers the damage."""
    damages, costs, budget, power = problem
    if least_cost(costs) > budget:
        return
    bought = at_lowest_price(damages, costs, budget, power)
    limit = sum_of(costs, bought)
    best = min(damage_of(w, damages, power) for w in all_divisions(damages) if sum_of(costs, w) <= limit)
    assert damage_of(bought, damages, power) <= best + 1e-9
    assert damage_of(allocate(damages, costs, budget, power), damages, power) <= best + 1e-9


@quick
@given(problem=problems(convex=True))
def test_an_allocation_is_the_best_of_all_where_each_channel_brings_less_than_the_one_before(problem):
    damages, costs, budget, _ = problem
    budget = max(len(damages), int(budget)) + 0.5
    widths = allocate(damages, costs, budget)
    best = min(damage_of(w, damages, 1.0) for w in all_divisions(damages) if sum_of(costs, w) <= budget)
    assert damage_of(widths, damages, 1.0) == pytest.approx(best, rel=1e-9, abs=1e-9)


def optimum(damages, costs, budget):
    """The least damage of all divisions, by integer programming: one of the widths of each module is chosen."""
    sizes = [len(table) for table in damages.values()]
    chosen = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    damage, cost = (np.concatenate([[*t.values()] for t in tables.values()]) for tables in (damages, costs))
    limits = [LinearConstraint(chosen, 1, 1), LinearConstraint(cost, -np.inf, budget)]
    return milp(damage, constraints=limits, bounds=Bounds(0, 1), integrality=1).fun


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_one_budget_serves_linear_and_quadratic_costs_and_comes_near_the_optimum(keep):
    """Twelve modules; the cost of every other one grows with the square of its width, as that of a backbone's does."""
    generator, above = np.random.default_rng(0), []
    for _ in range(5):
        damages, costs = {}, {}
        for number in range(12):
            widths = range(1, 17)
            falls = generator.uniform(0.8, 1.2, 16) * np.exp(-generator.uniform(0, 3) * np.arange(16) / 16)
            per_channel = generator.integers(1, 9)
            damages[f"{number}"] = {width: float(falls[width:].sum()) for width in widths}
            costs[f"{number}"] = {w: float(per_channel * (w**2 / 8 if number % 2 else w)) for w in widths}
        budget = keep * sum(table[16] for table in costs.values())
        found = allocate(damages, costs, budget)
        assert sum_of(costs, found) <= budget
        above.append(damage_of(found, damages, 1.0) / optimum(damages, costs, budget) - 1)
    assert min(above) > -1e-6
    assert np.mean(above) < 0.02 and max(above) < 0.06


def test_a_module_whose_cost_grows_with_the_square_of_its_width_is_cut_deeper_than_one_that_is_as_dear_when_whole():
    damages = {name: {w: float(8 - w) for w in range(1, 9)} for name in ("linear", "quadratic")}
    costs = {"linear": {w: 8.0 * w for w in range(1, 9)}, "quadratic": {w: float(w**2) for w in range(1, 9)}}
    assert allocate(damages, costs, 64.0) == {"linear": 6, "quadratic": 4}  # its fifth channel costs 9


def test_a_budget_is_spent_to_the_end():
    tables = {name: table([1.0, 0.0]) for name in "ab"}
    costs = {name: table([1.0, 2.0]) for name in "ab"}
    assert allocate(tables, costs, 3.0) == {"a": 2, "b": 1}


def test_a_wider_module_that_is_predicted_to_do_more_damage_is_not_bought():
    damages = {"a": table([3.0, 1.0, 1.5, 0.0]), "b": table([0.5, 0.0])}
    widths = allocate(damages, {name: {w: float(w) for w in damages[name]} for name in damages}, 5.0)
    assert damage_of(widths, damages, 1.0) == 1.0


def test_a_module_that_is_worth_nothing_before_it_is_whole_is_bought_whole():
    damages = {"a": table([10.0, 10.0, 10.0, 0.0]), "b": table([1.0, 0.6, 0.3, 0.0])}
    widths = allocate(damages, {name: {w: float(w) for w in damages[name]} for name in damages}, 5.0)
    assert widths == {"a": 4, "b": 1}


def test_what_cannot_be_cut_counts_in_the_whole():
    costs = {"a": table([1.0, 2.0, 3.0, 4.0])}
    prices = Prices(8.0, costs)
    prices.check(0.625)
    with pytest.raises(UserError, match=r"--keep 0\.6: .* smallest widths cost, expected at least 0\.625"):
        prices.check(0.6)


@pytest.mark.parametrize(
    ("width", "unit", "expected"),
    [
        (8, 2, [2, 4, 6, 8]),
        (7, 3, [3, 6, 7]),
        (4, 4, [4]),
        (4, 9, [4]),
        (66, 2, [2, *range(4, 65, 4), 66]),
    ],
)
def test_widths_are_the_least_one_and_spread_evenly_up_to_the_whole(width, unit, expected):
    assert widths_tried(width, unit) == expected


@pytest.mark.parametrize("seed", range(40))
def test_a_target_of_exactly_the_least_time_is_met(seed):
    rng = random.Random(seed)
    times = {str(name): sorted(round(rng.uniform(0.1, 5), 6) for _ in range(5)) for name in range(20)}
    costs = {name: dict(enumerate(of_module)) for name, of_module in times.items()}
    damages = {name: {width: (4 - width) * rng.random() for width in range(5)} for name in times}
    prices = Prices(sum(table[4] for table in costs.values()), costs, outside=round(rng.uniform(1, 20), 6))
    for target_ms in (prices.outside + prices.least, math.ceil(1000 * (prices.outside + prices.least)) / 1000):
        keep = prices.fraction_in(target_ms)
        prices.check(keep)
        widths = allocate(damages, costs, prices.budget(keep).limit)
        assert prices.outside + sum_of(costs, widths) <= target_ms * (1 + 1e-9)
    with pytest.raises(UserError, match=r"^--target_ms .*, expected at least "):
        prices.fraction_in(prices.outside + prices.least - 1e-3)


def test_the_least_time_is_told_with_all_its_digits():
    prices = Prices(5000.0, {"a": {1: 1000.0, 2: 4765.439}})
    with pytest.raises(UserError, match=r"expected at least 1234\.561$"):
        prices.fraction_in(1234.56)
    assert prices.fraction_in(1234.561) == pytest.approx(1234.561 / 5000)
