"""Two budgets on tables alone: both hold exactly, and the damage is near that of the best of all divisions."""

import ctypes
import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning import two_budgets
from pruning.allocation import Budget, allocate, sum_of
from pruning.budget import POWERS
from pruning.config import SearchConfig
from pruning.cost_tables import Prices
from pruning.two_budgets import GAP, allocate_both, choose, least_within
from tests.pruning.samples import quick
from tests.pruning.test_allocation import all_divisions, damage_of
from util.errors import NonFiniteLossError, UserError
from util.native_output import without_native_stdout


@st.composite
def tables(draw, sizes, low=1, high=40):
    """Values at the widths from 1 on, in no order, in quarters, so that their sums are exact."""
    numbers = st.integers(low, high)
    return {
        name: {width: draw(numbers) / 4 for width in range(1, size + 1)}
        for name, size in zip("abc", sizes, strict=False)
    }


@st.composite
def problems(draw):
    """Damages of up to three modules with up to five widths, two budgets and a power."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    damages = draw(tables(sizes, low=0))
    budgets = []
    for _ in range(2):
        costs = draw(tables(sizes))
        budgets.append(Budget(costs, draw(st.integers(1, 200)) / 4))
    return damages, tuple(budgets), draw(st.sampled_from(POWERS))


def within(damages, budgets):
    return [widths for widths in all_divisions(damages) if all(budget.fits(widths) for budget in budgets)]


@quick
@given(problem=problems())
def test_an_allocation_is_the_best_of_all_divisions_within_both_budgets(problem):
    damages, budgets, power = problem
    allowed = within(damages, budgets)
    if not allowed:
        with pytest.raises(ValueError, match=r"found budgets of .*, expected some that can be met"):
            allocate_both(damages, budgets, power)
        return
    widths = allocate_both(damages, budgets, power)
    assert all(budget.fits(widths) for budget in budgets)
    least = min(damage_of(w, damages, power) for w in allowed)
    assert damage_of(widths, damages, power) <= least * (1 + 2 * GAP) + 1e-9
    assert allocate_both(damages, budgets, power) == widths


@quick
@given(problem=problems())
def test_the_least_of_one_cost_within_the_other_is_that_of_all_divisions(problem):
    _, (first, second), _ = problem
    allowed = within(first.costs, [first])
    if allowed:
        widths = least_within(second.costs, first)
        assert first.fits(widths)
        assert sum_of(second.costs, widths) <= min(sum_of(second.costs, w) for w in allowed) * (1 + 2 * GAP)


def realistic(modules, seed=0):
    """Damages, and costs of two kinds: one grows with the width, one is noise around it."""
    generator, damages, costs, params = np.random.default_rng(seed), {}, {}, {}
    for number in range(modules):
        widths = np.arange(1, 18)
        damage = np.exp(generator.normal(0, 2) - generator.uniform(1, 6) * widths / 17)
        damage[-1] = 0.0
        time = np.exp(generator.normal(0, 1)) * (0.3 + widths / 17) * np.exp(generator.normal(0, 0.2, 17))
        each = int(np.exp(generator.normal(8, 1)))
        names = widths.tolist()
        damages[f"{number}"] = dict(zip(names, damage.tolist(), strict=True))
        costs[f"{number}"] = dict(zip(names, time.tolist(), strict=True))
        params[f"{number}"] = {width: each * width for width in names}
    return damages, costs, params


@pytest.mark.parametrize("keeps", [(0.5, 0.7), (0.8, 0.4)])
def test_many_modules_fit_both_budgets_and_no_single_step_lowers_the_damage(keeps):
    damages, *both = realistic(15)
    budgets = tuple(Budget(t, keep * sum_of(t, dict.fromkeys(t, 17))) for t, keep in zip(both, keeps, strict=True))
    widths = allocate_both(damages, budgets)
    assert all(budget.fits(widths) for budget in budgets) and allocate_both(damages, budgets) == widths
    found = damage_of(widths, damages, 1.0)
    for name, other in itertools.product(damages, range(1, 18)):
        changed = {**widths, name: other}
        if all(budget.fits(changed) for budget in budgets):
            assert damage_of(changed, damages, 1.0) >= found * (1 - GAP)


@pytest.mark.parametrize("above", [1e-12, 1e-9, 1e-7, 4e-7])
def test_widths_that_exceed_a_budget_by_the_tolerance_of_the_solver_are_not_chosen(above):
    damages = {"a": {1: 1.0, 2: 0.0}, "b": {1: 1.0, 2: 0.0}, "c": {1: 1.5, 2: 0.0}}
    costs = {"a": {1: 0.0, 2: 0.5}, "b": {1: 0.0, 2: 0.5 + above}, "c": {1: 0.0, 2: 0.9}}
    budgets = (Budget(costs, 1.0), Budget({name: {1: 0.0, 2: 1.0} for name in costs}, 3.0))
    assert allocate_both(damages, budgets) == {"a": 1, "b": 1, "c": 2}  # a and b together would be better


def test_a_budget_of_exactly_the_least_widths_can_be_met():
    costs = {name: {1: 0.1, 2: 0.7} for name in "abc"}
    damages = {name: {1: 1.0, 2: 0.0} for name in "abc"}
    exact = Budget(costs, sum(0.1 for _ in costs))
    loose = Budget({name: {1: 1.0, 2: 2.0} for name in "abc"}, 100.0)
    for budgets in ((exact, loose), (loose, exact), (exact, exact)):
        assert allocate_both(damages, budgets) == dict.fromkeys("abc", 1)
    assert allocate_both(damages, (loose, loose)) == dict.fromkeys("abc", 2)


def test_a_start_that_is_the_best_stays():
    costs = {"a": {1: 1.0, 2: 2.0}}
    assert choose({"a": {1: 1.0, 2: 1.0}}, [Budget(costs, 2.0)], {"a": 2}) == {"a": 2}
    assert choose({"a": {1: 0.0, 2: 0.0}}, [Budget(costs, 2.0)], {"a": 1}) == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damage_that_is_not_finite_is_named_with_its_module(value):
    costs, damages = {"a": {1: 1.0, 2: 2.0}, "b": {1: 1.0, 2: 2.0}}, {"a": {1: 1.0, 2: 0.0}, "b": {1: value, 2: 0.0}}
    for run in (lambda: allocate_both(damages, (Budget(costs, 3.0),) * 2), lambda: allocate(damages, costs, 3.0)):
        with pytest.raises(NonFiniteLossError, match=r"^calibration: the damage of b at width 1 is not finite$"):
            run()


@pytest.mark.parametrize(
    ("nodes", "margins", "warnings"),
    [(two_budgets.NODES, two_budgets.MARGINS, 0), (1, two_budgets.MARGINS, 1), (two_budgets.NODES, (), 1)],
)
def test_widths_that_are_not_proven_to_be_the_best_are_warned_of_once(monkeypatch, nodes, margins, warnings):
    logged = []
    two_budgets._warn_once.cache_clear()
    monkeypatch.setattr(two_budgets, "show", logged.extend)
    monkeypatch.setattr(two_budgets, "NODES", nodes)
    monkeypatch.setattr(two_budgets, "MARGINS", margins)
    damages, *both = realistic(15)
    budgets = tuple(Budget(table, 0.6 * sum_of(table, dict.fromkeys(table, 17))) for table in both)
    for _ in range(2):
        widths = allocate_both(damages, budgets)
    assert all(budget.fits(widths) for budget in budgets)
    assert len(logged) == warnings and all("no widths have less damage than the chosen" in text for _, text in logged)


def two_prices():
    """Module a's narrow width is slow; b's is fast."""
    milliseconds = {"a": {8: 5.0, 16: 2.0, 24: 4.0}, "b": {8: 1.0, 16: 6.0}}
    params = {"a": {8: 100, 16: 200, 24: 300}, "b": {8: 300, 16: 600}}
    return Prices(10.0, milliseconds, 5.0, Prices(1000, params))


def test_the_whole_width_counts_where_another_is_slower():
    prices = two_prices()
    assert prices.least == 3.0 and prices.kept_fraction({"a": 24, "b": 16}) == 1.0
    assert prices.budget(0.6).limit == pytest.approx(6.0) and prices.budget(0.1).limit == 3.0


def test_rounding_cuts_no_module_where_all_may_be_kept():
    """The rest of the cost is a difference, the last bit of which may be lost."""
    for count in range(2, 40):
        costs = {f"{number}": {1: 0.05, 2: 0.1 * (1 + number)} for number in range(count)}
        whole, half = dict.fromkeys(costs, 2), {name: 1 + number % 2 for number, name in enumerate(costs)}
        prices = Prices(sum_of(costs, whole) + 100.1, costs)
        params = Prices(1000 * count, {name: {1: 1, 2: 100} for name in costs})
        damages = {name: {1: 1.0, 2: 0.0} for name in costs}
        assert allocate_both(damages, (prices.budget(1.0), params.budget(1.0))) == whole
        assert prices.budget(prices.kept_fraction(half)).fits(half)


def test_budgets_that_can_only_be_met_one_at_a_time_are_one_sentence_with_the_least_that_can():
    prices = two_prices()
    assert prices.fractions(SearchConfig(keep=[0.6], keep_params=0.5)) == {"0.60": 0.6}
    with pytest.raises(
        UserError, match=r"^--keep_params 0\.55: .* possible with --keep 0\.5, expected at least 0\.600$"
    ):
        prices.fractions(SearchConfig(keep=[0.6, 0.5], keep_params=0.55))
    prices.fractions(SearchConfig(keep=[0.6], keep_params=0.55))
    prices.fractions(SearchConfig(keep=[0.5], keep_params=0.6))
    with pytest.raises(
        UserError, match=r"^--keep_params 0\.55: .* possible with --target_ms 10, expected at least 0\.6"
    ):
        prices.fractions(SearchConfig(target_ms=[10.0], keep_params=0.55))
    with pytest.raises(UserError, match=r"^--keep_params 0\.3: .* smallest widths cost, expected at least 0\.500$"):
        prices.fractions(SearchConfig(keep=[0.6], keep_params=0.3))
    with pytest.raises(UserError, match=r"^--keep 0\.2: .* smallest widths cost, expected at least 0\.300$"):
        prices.fractions(SearchConfig(keep=[0.2], keep_params=0.5))


def test_what_native_code_prints_is_discarded(capfd):
    printf = ctypes.CDLL(None).printf
    print("before")
    with without_native_stdout():
        printf(b"from a library\n")
        os.write(1, b"at once\n")
    printf(b"after\n")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
