"""A search by budget on modules without a network: what it spends, what it measures, what it repeats."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.budget import EVALUATIONS, POWERS, BudgetSearch
from pruning.journal import Trial
from tests.pruning.fakes import FakeBench, constant, fake_module, fake_modules
from tests.pruning.samples import quick
from util.errors import UserError


class BeforeTheRest(BudgetSearch):
    """A search that spends nothing of what the price leaves over."""

    def _spend_rest(self, widths, budget, power):
        return widths


def search_of(tables, costs, kind=BudgetSearch, fixed_cost=0.0):
    """A search that knows the damages: for each module a damage for each width from 1, 0 at the last."""
    modules = {name: fake_module(name, len(table), 1, False) for name, table in tables.items()}
    bench = FakeBench(modules, constant(0.5))
    total = fixed_cost + sum(costs[name] * len(table) for name, table in tables.items())
    damages = {name: {width + 1: d for width, d in enumerate(table)} for name, table in tables.items()}
    search = kind(bench, costs, total, dict.fromkeys(tables, 1), 0.5)
    search._damages = damages
    return search


@st.composite
def problems(draw, convex=False):
    """Damages of up to three modules with up to five widths, costs, a fraction to keep and a power.

    Costs and fraction are dyadic, so that their sums are exact.
    """
    tables, costs = {}, {}
    for number in range(draw(st.integers(1, 3))):
        falls = draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
        falls = sorted(falls, reverse=True) if convex else falls
        tables[f"encoder.{number}.ffn"] = [sum(falls[width:]) for width in range(len(falls) + 1)]
        costs[f"encoder.{number}.ffn"] = 1.0 if convex else draw(st.integers(2, 20)) / 4
    return tables, costs, draw(st.integers(1, 64)) / 64, draw(st.sampled_from(POWERS))


def cost_of(widths, costs):
    return sum(costs[name] * width for name, width in widths.items())


def damage_of(widths, tables, power):
    return sum(tables[name][width - 1] ** power for name, width in widths.items())


def all_divisions(tables):
    choices = itertools.product(*(range(1, len(table) + 1) for table in tables.values()))
    return [dict(zip(tables, widths, strict=True)) for widths in choices]


@quick
@given(problem=problems())
def test_a_division_never_costs_more_than_the_budget_and_leaves_no_room(problem):
    tables, costs, keep, power = problem
    budget = keep * cost_of({name: len(table) for name, table in tables.items()}, costs)
    if cost_of(dict.fromkeys(tables, 1), costs) > budget:
        with pytest.raises(UserError, match=r"--keep .*: found that one unit of every module keeps"):
            search_of(tables, costs).allocate(keep, power)
        return
    widths = search_of(tables, costs).allocate(keep, power)
    assert cost_of(widths, costs) <= budget
    for name, table in tables.items():
        if widths[name] < len(table):
            assert cost_of(widths, costs) + costs[name] > budget


@quick
@given(problem=problems())
def test_nothing_as_cheap_does_less_damage_than_what_a_price_buys(problem):
    """Everett's theorem; what is left over is spent afterwards, and only lowers the damage."""
    tables, costs, keep, power = problem
    if cost_of(dict.fromkeys(tables, 1), costs) > keep * sum(costs[n] * len(t) for n, t in tables.items()):
        return
    bought = search_of(tables, costs, BeforeTheRest).allocate(keep, power)
    limit = cost_of(bought, costs)
    best = min(damage_of(w, tables, power) for w in all_divisions(tables) if cost_of(w, costs) <= limit)
    assert damage_of(bought, tables, power) <= best + 1e-9
    assert damage_of(search_of(tables, costs).allocate(keep, power), tables, power) <= best + 1e-9


@quick
@given(problem=problems(convex=True))
def test_a_division_is_the_best_of_all_where_each_channel_brings_less_than_the_one_before(problem):
    tables, costs, keep, _ = problem
    total = sum(map(len, tables.values()))
    keep = (max(len(tables), int(keep * total)) + 0.5) / total
    widths = search_of(tables, costs).allocate(keep, 1.0)
    affordable = [w for w in all_divisions(tables) if cost_of(w, costs) <= keep * total]
    best = min(damage_of(w, tables, 1.0) for w in affordable)
    assert damage_of(widths, tables, 1.0) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_a_wider_module_that_is_predicted_to_do_more_damage_is_not_bought():
    tables = {"encoder.0.ffn": [3.0, 1.0, 1.5, 0.0], "encoder.1.ffn": [0.5, 0.0]}
    widths = search_of(tables, dict.fromkeys(tables, 1.0)).allocate(5 / 6, 1.0)
    assert damage_of(widths, tables, 1.0) == 1.0


def test_a_module_that_is_worth_nothing_before_it_is_whole_is_bought_whole():
    tables = {"encoder.0.ffn": [10.0, 10.0, 10.0, 0.0], "encoder.1.ffn": [1.0, 0.6, 0.3, 0.0]}
    widths = search_of(tables, dict.fromkeys(tables, 1.0)).allocate(5 / 8, 1.0)
    assert widths == {"encoder.0.ffn": 4, "encoder.1.ffn": 1}


def test_what_cannot_be_cut_counts_in_the_whole():
    tables = {"encoder.0.ffn": [3.0, 2.0, 1.0, 0.0]}
    search = search_of(tables, {"encoder.0.ffn": 1.0}, fixed_cost=4.0)
    assert search.allocate(0.75, 1.0) == {"encoder.0.ffn": 2}
    with pytest.raises(UserError, match=r"--keep 0\.6: .* keeps 0\.625 of the transformer's cost"):
        search.allocate(0.6, 1.0)


def damage(name, width):
    return float((10 - width) ** 2)


def divisions(trials):
    """The different widths among trials."""
    return {tuple(trial.widths.items()) for trial in trials}


def run(ap, keep, replayed=()):
    bench = FakeBench(fake_modules(), ap, damage=damage)
    trials, costs = [], dict.fromkeys(bench.modules, 1.0)
    units = {"encoder.0.attention": 2, "encoder.0.ffn": 2}
    search = BudgetSearch(bench, costs, 14.0, units, 0.5, trials.append, list(replayed))
    kept, best = search.run(keep, 0.45)
    return bench, search, trials, kept, best


def widths_of(kept):
    return {name: len(next(iter(sets.values()))) for name, sets in kept.items()}


def test_a_fraction_is_divided_in_several_ways_and_the_best_by_map_is_taken():
    bench, search, trials, kept, best = run(lambda widths, whole: widths["encoder.0.ffn"] / 10, 0.6)
    assert [trial.power for trial in trials] == list(POWERS)
    assert best.full_ap == max(trial.full_ap for trial in trials)
    assert widths_of(kept) == best.widths == bench.widths
    assert all(
        trial.kept_fraction <= 0.6 and sum(trial.widths.values()) == 14 * trial.kept_fraction for trial in trials
    )
    assert search.trials == trials
    # Divisions that come out alike are measured once.
    assert [entry[0] for entry in bench.asked].count("full") == len(divisions(trials))
    assert not any(entry[0] == "subset" for entry in bench.asked)


def test_every_trial_begins_with_the_whole_network_and_cuts_in_network_order():
    bench, _, trials, *_ = run(constant(0.5), 0.6)
    events = [entry[0] for entry in bench.asked]
    starts = [index for index, event in enumerate(events) if event == "reset"]
    assert len(starts) == 1 + len(divisions(trials))
    assert events[-1] == "load"  # the best one is put back, not made again
    for index in starts:
        assert [entry[1] for entry in bench.asked[index + 1 : index + 3]] == list(bench.modules)


@pytest.mark.parametrize("aps", list(itertools.permutations((0.1, 0.2, 0.3))))
def test_of_several_powers_the_trial_of_the_greatest_map_is_taken_and_its_cut_kept(aps):
    class Told(BudgetSearch):
        def _trial(self, keep, power, widths):
            number = POWERS.index(power)
            self._last_cut = (number,), None
            return Trial(keep, power, {"encoder.0.ffn": number}, aps[number], keep)

    search = search_of({"encoder.0.ffn": [1.0, 0.0]}, {"encoder.0.ffn": 1.0}, Told)
    assert search._best_power(0.5).full_ap == 0.3
    assert search._best_cut[0] == (aps.index(0.3),)


def test_a_trial_of_just_the_map_that_is_asked_for_passes():
    _, _, trials, _, best = run(constant(0.45), None)
    assert best.full_ap == 0.45 and best in trials and best.kept_fraction < 1


@pytest.mark.parametrize("needed", range(4, 13))
def test_without_a_fraction_a_search_finds_about_the_least_that_passes(needed):
    bench, _, trials, kept, best = run(lambda w, whole: 0.5 if sum(w.values()) >= needed else 0.1, None)
    assert 0 < len(trials) <= EVALUATIONS
    assert best.full_ap >= 0.45
    assert sum(widths_of(kept).values()) <= needed + 2
    assert widths_of(kept) == best.widths == bench.widths
    assert all(trial.full_ap < 0.45 for trial in trials if sum(trial.widths.values()) < needed)


def test_without_a_fraction_a_search_keeps_everything_where_nothing_less_passes():
    bench, _, trials, kept, best = run(lambda w, whole: 0.5 if sum(w.values()) == 14 else 0.0, None)
    assert widths_of(kept) == bench.widths == {"encoder.0.attention": 8, "encoder.0.ffn": 6}
    assert best is None
    assert 0 < len(trials) <= EVALUATIONS


@pytest.mark.parametrize("keep", [0.6, None])
def test_replayed_trials_are_not_measured_again_and_the_outcome_is_the_same(keep):
    ap = lambda widths, whole: 0.5 - 0.03 * (14 - sum(widths.values())) ** 0.5  # noqa: E731
    _, _, trials, kept, best = run(ap, keep)
    for done in range(len(trials) + 1):
        bench, search, new, again, same = run(ap, keep, replayed=trials[:done])
        assert new == trials[done:]
        assert search.trials == trials
        assert widths_of(again) == widths_of(kept) == bench.widths
        assert same == best
        assert [entry[0] for entry in bench.asked].count("full") == len(divisions(trials) - divisions(trials[:done]))


def test_trials_of_another_search_are_refused():
    _, _, trials, _, _ = run(constant(0.5), 0.6)
    other = dataclasses.replace(trials[0], widths={**trials[0].widths, "encoder.0.ffn": 2}, full_ap=0.99)
    with pytest.raises(UserError, match="journal: found a trial"):
        run(constant(0.5), 0.6, replayed=[other])


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
def test_damage_is_predicted_at_the_least_width_and_evenly_up_to_the_whole(width, unit, expected):
    module = fake_module("encoder.0.ffn", width, 1, False)
    bench = FakeBench({module.name: module}, constant(0.5), damage=lambda name, width: 1 / width)
    search = BudgetSearch(bench, {module.name: 1.0}, float(width), {module.name: unit}, 0.5)
    search.run(1.0)
    damages = search._damages[module.name]
    assert sorted(damages) == expected
    assert all(value == (0 if w == width else 1 / w) for w, value in damages.items())


@pytest.mark.parametrize(
    ("is_attention", "is_deformable", "expected"),
    [(True, False, {2, 4, 8, 12, 16}), (True, True, {*range(2, 17, 2)}), (False, False, {*range(2, 17, 2)})],
    ids=["attention", "deformable attention", "ffn"],
)
def test_damage_is_measured_at_few_widths_where_each_takes_a_forward(is_attention, is_deformable, expected):
    module, measured = fake_module("encoder.0.module", 16, 2, is_attention, is_deformable), set()
    bench = FakeBench({module.name: module}, constant(0.5), damage=lambda name, width: measured.add(width) or 1 / width)
    search = BudgetSearch(bench, {module.name: 1.0}, 16.0, {module.name: 2}, 0.5)
    search.run(None, 0.5)
    assert {2, 16} <= measured
    assert expected <= measured
    assert sorted(search._damages[module.name]) == [*range(2, 17, 2)]
    measured.clear()
    search = BudgetSearch(bench, {module.name: 1.0}, 16.0, {module.name: 2}, 0.5)
    search.run(1.0)
    assert measured - {16} == {*range(2, 16, 2)}  # where a fraction is asked for, each


@quick
@given(
    # Subnormal numbers are nothing where other tests have had torch flush them.
    losses=st.dictionaries(st.floats(1e-12, 10), st.floats(-0.1, 0.6, allow_subnormal=False), min_size=1, max_size=4),
    allowed=st.floats(0, 0.5, allow_subnormal=False),
    ends=st.tuples(st.floats(0.3, 0.6), st.floats(0.65, 1.0)),
)
def test_the_next_guess_lies_between_what_failed_and_what_passed(losses, allowed, ends):
    tables = {"encoder.0.ffn": [3.0, 1.0, 0.5, 0.0], "encoder.1.ffn": [0.5, 0.1, 0.0]}
    guess = search_of(tables, dict.fromkeys(tables, 1.0))._guess(losses, allowed, *ends)
    assert ends[0] <= guess <= ends[1]


def test_trials_that_lose_alike_tell_no_slope():
    tables = {"encoder.0.ffn": [3.0, 1.0, 0.5, 0.0]}
    search = search_of(tables, {"encoder.0.ffn": 1.0})
    for losses in ({1.0: 0.0020, 10.0: 0.00202}, {1.0: 0.0, 3.0: 0.0001003}):
        assert 0.3 < search._guess(losses, 0.06, 0.3, 0.9) < 0.9


@quick
@given(st.floats(0.3, 1), st.integers(1, 12), st.integers(1, 50))
def test_widths_are_multiples_of_the_units_or_whole(keep, attention_unit, ffn_unit):
    modules = {
        "encoder.0.attention": fake_module("encoder.0.attention", 4 * 32, 4, True),
        "encoder.0.ffn": fake_module("encoder.0.ffn", 200, 1, False),
    }
    units = {"encoder.0.attention": 4 * attention_unit, "encoder.0.ffn": ffn_unit}
    bench = FakeBench(modules, lambda w, whole: sum(w.values()) / 400, damage=lambda n, w: 1 / w)
    search = BudgetSearch(bench, dict.fromkeys(modules, 1.0), 328.0, units, 0.82)
    for asked in (keep, None):
        kept, _ = search.run(asked, 0.82 * keep)
        for name, width in widths_of(kept).items():
            assert width % units[name] == 0 or width == modules[name].width


def test_widths_that_were_measured_before_cost_no_evaluation():
    class Told(BudgetSearch):
        guesses = iter((0.76, 0.755, 0.752, 0.7, 0.63, 0.57, 0.51))

        def _guess(self, losses, allowed, fails, passes):
            return next(self.guesses)

    modules = {f"encoder.{number}.ffn": fake_module(f"encoder.{number}.ffn", 4, 1, False) for number in range(4)}
    bench = FakeBench(modules, lambda widths, whole: sum(widths.values()) / 32, damage=damage)
    trials = []
    search = Told(bench, dict.fromkeys(modules, 1.0), 16.0, dict.fromkeys(modules, 1), 0.5, trials.append)
    kept, best = search.run(None, 9 / 32)
    # The first three guesses come out as 12 channels.
    assert [sum(trial.widths.values()) for trial in trials] == [12, 11, 10, 9]
    assert len(trials) == EVALUATIONS == [entry[0] for entry in bench.asked].count("full")
    assert best is trials[-1] and widths_of(kept) == best.widths == bench.widths


def test_a_trial_of_an_earlier_run_is_taken_without_being_measured_again():
    bench, search, _, _, _ = run(constant(0.45), None)
    measured = [entry[0] for entry in bench.asked].count("full")
    kept, best = search.run(None, 0.45)
    assert [entry[0] for entry in bench.asked].count("full") == measured
    assert best in search.trials and widths_of(kept) == best.widths == bench.widths


def test_the_whole_network_is_no_trial_and_needs_no_measurement():
    modules = {"encoder.0.ffn": fake_module("encoder.0.ffn", 4, 1, False)}
    bench = FakeBench(modules, constant(0.5), damage=damage)
    search = BudgetSearch(bench, {"encoder.0.ffn": 1.0}, 4.0, {"encoder.0.ffn": 4}, 0.5)
    kept, best = search.run(None, 0.45)
    assert best is None and widths_of(kept) == {"encoder.0.ffn": 4}
    assert search.trials == [] and not any(entry[0] == "full" for entry in bench.asked)
