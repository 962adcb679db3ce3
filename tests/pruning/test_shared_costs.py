"""Budgets where the attentions of decoder layers share costs, against all widths of small tables."""

import itertools
import random

import pytest

from pruning.allocation import ROUNDING, Shared, sum_of
from pruning.budget import BudgetSearch
from pruning.cost_tables import Prices
from tests.pruning.fakes import FakeBench, constant, fake_module

WIDTHS = (0, 2, 4)
NAMES = tuple(f"decoder.{layer}.{block}" for layer in (0, 1) for block in ("self_attention", "cross_attention", "ffn"))


def random_search(seed, has_two_budgets):
    """A search over two decoder layers with random tables, and its fractions of the cost and of the parameters."""
    rng = random.Random(seed)
    costs, params, damages = {}, {}, {}
    for name in NAMES:
        cost, params_per_channel, damage = rng.uniform(0.5, 2), rng.uniform(0.5, 2), rng.uniform(0.1, 3)
        costs[name] = {width: cost * width for width in WIDTHS}
        params[name] = {width: params_per_channel * width for width in WIDTHS}
        damages[name] = {0: damage * rng.uniform(1.2, 3), 2: damage * 0.4, 4: 0.0}
    shared = tuple(Shared(rng.uniform(0.5, 2.5), NAMES[start : start + 2]) for start in (0, 3))
    total = sum(table[4] for table in costs.values()) + sum(part.cost for part in shared)
    of_params = Prices(sum(table[4] for table in params.values()), params) if has_two_budgets else None
    modules = {name: fake_module(name, 4, 1, False) for name in NAMES}
    keep, keep_params = rng.uniform(0.02, 0.9), rng.uniform(0.02, 0.9) if has_two_budgets else None
    prices = Prices(total, costs, params=of_params, shared=shared)
    search = BudgetSearch(FakeBench(modules, constant(0.5)), prices, 0.5, keep_params=keep_params)
    search.damages = damages
    return search, keep


def is_within(search, keep, widths):
    params = search._kept_params(widths)
    return search.prices.kept_fraction(widths) <= keep + ROUNDING and (
        params is None or params <= search.keep_params + ROUNDING
    )


@pytest.mark.parametrize("has_two_budgets", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_budgets_hold_and_a_shared_cost_that_is_gone_never_does_harm(seed, has_two_budgets):
    search, keep = random_search(seed, has_two_budgets)
    widths = search._allocate(keep, 1.0)
    assert is_within(search, keep, widths)
    every = (dict(zip(NAMES, chosen, strict=True)) for chosen in itertools.product(WIDTHS, repeat=len(NAMES)))
    least = min(sum_of(search.damages, each) for each in every if is_within(search, keep, each))
    found = sum_of(search.damages, widths)
    assert least - 1e-9 <= found <= 2 * least + 1e-9
    without_credit = search._divide(search.prices.budget(keep), 1.0, 0)
    assert found <= sum_of(search.damages, without_credit) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_two_budgets_are_refused_only_where_no_widths_meet_both(seed):
    search, _ = random_search(seed, True)
    for keep, keep_params in itertools.product((-0.01, 0.0, 0.05), repeat=2):
        assert search.prices.allows(keep, keep_params) == (keep >= 0 and keep_params >= 0)
