"""A search by budget on modules without a network: what it spends, what it measures, what it repeats."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.allocation import Shared, widths_tried
from pruning.budget import EVALUATIONS, POWERS, BudgetSearch, cuts_at_most, widths_to_measure
from pruning.cost_tables import Prices
from pruning.journal import Trial
from tests.pruning.fakes import FakeBench, constant, fake_module, fake_modules
from tests.pruning.samples import quick
from util.errors import UserError


def search_over(bench, units, base_ap=0.5, kind=BudgetSearch, min_units=1, of_prices=None, **options):
    """A search in which every channel costs 1; `units` are of all modules or of each, `of_prices` for `Prices`."""
    if isinstance(units, int):
        units = dict.fromkeys(bench.modules, units)
    costs = {
        name: {width: float(width) for width in widths_tried(module.width, units[name], min_units)}
        for name, module in bench.modules.items()
    }
    total = float(sum(module.width for module in bench.modules.values()))
    return kind(bench, Prices(total, costs, **of_prices or {}), base_ap, **options)


def search_of(tables, kind=BudgetSearch):
    """A search that knows the damages: for each module a damage for each width from 1, 0 at the last."""
    modules = {name: fake_module(name, len(table), 1, False) for name, table in tables.items()}
    search = search_over(FakeBench(modules, constant(0.5)), 1, kind=kind)
    search.damages = {name: {width + 1: d for width, d in enumerate(table)} for name, table in tables.items()}
    return search


def test_width_0_is_tried_only_if_asked_for():
    assert widths_tried(32, 8) == [8, 16, 24, 32]
    assert widths_tried(32, 8, 0) == [0, 8, 16, 24, 32]
    assert widths_tried(5, 8, 0) == [0, 5]
    assert widths_tried(5, 8) == [5]


def test_width_0_is_measured_besides_the_widths_of_an_attention():
    attention, ffn = fake_module("encoder.0.attention", 32, 2, True), fake_module("encoder.0.ffn", 32, 1, False)
    widths = list(range(0, 33, 2))
    assert widths_to_measure(attention, widths, 4) == [0, *widths_to_measure(attention, widths[1:], 4)]
    assert widths_to_measure(ffn, widths, 4) == widths[:-1]


def test_what_cannot_be_cut_counts_in_the_whole():
    search = search_of({"encoder.0.ffn": [3.0, 2.0, 1.0, 0.0]})
    search.prices = dataclasses.replace(search.prices, total=search.prices.total + 4.0)
    assert search._allocate(0.75, 1.0) == {"encoder.0.ffn": 2}
    with pytest.raises(UserError, match=r"--keep 0\.6: .* smallest widths cost, expected at least 0\.625"):
        search.run(0.6)


def damage(name, width):
    return float((10 - width) ** 2)


def divisions(trials):
    """The different widths among trials."""
    return {tuple(trial.widths.items()) for trial in trials}


def run(ap, keep, replayed=()):
    bench = FakeBench(fake_modules(), ap, damage=damage)
    trials = []
    search = search_over(bench, 2, on_trial=trials.append, replayed=list(replayed))
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


def test_a_detector_without_map_is_cut_once_for_each_fraction():
    """An mAP of 0 cannot choose between the powers."""
    trials = []
    bench = FakeBench(fake_modules(), constant(0.0), damage=damage)
    list(search_over(bench, 2, base_ap=0.0, on_trial=trials.append).run_each([0.6, 0.8]))
    assert [(trial.keep, trial.power) for trial in trials] == [(0.6, POWERS[0]), (0.8, POWERS[0])]


def removing(keeps, ap, replayed=()):
    """A search whose damages remove the FFN."""
    bench = FakeBench(
        fake_modules(), ap, damage=lambda name, width: 0.1 if name == "encoder.0.ffn" else damage("", width)
    )
    trials = []
    search = search_over(bench, 2, min_units=0, on_trial=trials.append, replayed=list(replayed))
    found = [(widths_of(kept), best) for kept, best in search.run_each(keeps)]
    return bench, trials, found


@pytest.mark.parametrize("removal_helps", [True, False])
def test_where_modules_are_removed_widths_without_removals_are_tried_too(removal_helps):
    ap = lambda widths, whole: 0.4 if (0 in widths.values()) == removal_helps else 0.3  # noqa: E731
    bench, trials, found = removing([0.6, 0.7], ap)
    assert [trial.keep for trial in trials] == [0.6] * (len(POWERS) + 1) + [0.7] * 2
    assert len(trials) == cuts_at_most(2, min_units=0)
    for widths, best in found:
        assert best.full_ap == 0.4 and widths == best.widths
        assert (0 in widths.values()) == removal_helps
    assert all((0 in trial.widths.values()) == (trial not in (trials[len(POWERS)], trials[-1])) for trial in trials)
    assert bench.widths == found[-1][0]
    for done in range(len(trials) + 1):
        again, new, same = removing([0.6, 0.7], ap, trials[:done])
        assert new == trials[done:] and same == found and again.widths == bench.widths


def test_a_budget_below_one_unit_everywhere_has_no_widths_without_removals():
    _, trials, _ = removing([2 / 14], constant(0.4))
    assert len(trials) == len(POWERS) and all(0 in trial.widths.values() for trial in trials)


def test_every_trial_begins_with_the_whole_network_and_cuts_in_network_order():
    bench, _, trials, *_ = run(constant(0.5), 0.6)
    events = [entry[0] for entry in bench.asked]
    starts = [index for index, event in enumerate(events) if event == "reset"]
    assert len(starts) == 1 + len(divisions(trials))
    assert events[-1] == "load"  # the best one is put back, not made again
    for index in starts:
        assert [entry[1] for entry in bench.asked[index + 1 : index + 3]] == list(bench.modules)


@pytest.mark.parametrize("aps", list(itertools.permutations((0.1, 0.2, 0.3))))
def test_the_power_with_the_best_map_is_used_and_its_cut_kept(aps):
    class Scripted(BudgetSearch):
        def _trial(self, keep, power, widths):
            number = POWERS.index(power)
            return Trial(keep, power, {"encoder.0.ffn": number}, aps[number], keep), number

    trial, cut = search_of({"encoder.0.ffn": [1.0, 0.0]}, Scripted)._best_power(0.5, POWERS)
    assert trial.full_ap == 0.3
    assert cut == aps.index(0.3)


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


def test_a_budget_of_the_whole_cost_keeps_everything_and_measures_nothing():
    bench, search, trials, kept, best = run(lambda widths, whole: 0.0, 1.0)
    assert widths_of(kept) == bench.widths == best.widths == {"encoder.0.attention": 8, "encoder.0.ffn": 6}
    assert best.full_ap == search.base_ap and {trial.kept_fraction for trial in trials} == {1.0}
    assert not any(entry[0] == "full" for entry in bench.asked)


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


@pytest.mark.parametrize(("width", "unit"), [(8, 2), (4, 4), (66, 2)])
def test_damage_is_predicted_at_each_width_that_is_tried(width, unit):
    module = fake_module("encoder.0.ffn", width, 1, False)
    bench = FakeBench({module.name: module}, constant(0.5), damage=lambda name, width: 1 / width)
    search = search_over(bench, unit)
    search.run(1.0)
    damages = search.damages[module.name]
    assert list(damages) == widths_tried(width, unit)
    assert all(value == (0 if w == width else 1 / w) for w, value in damages.items())


@pytest.mark.parametrize(
    ("is_attention", "is_deformable", "expected"),
    [(True, False, {2, 4, 8, 12, 16}), (True, True, {*range(2, 17, 2)}), (False, False, {*range(2, 17, 2)})],
    ids=["attention", "deformable attention", "ffn"],
)
def test_damage_is_measured_at_few_widths_where_each_takes_a_forward(is_attention, is_deformable, expected):
    module, measured = fake_module("encoder.0.module", 16, 2, is_attention, is_deformable), set()
    bench = FakeBench({module.name: module}, constant(0.5), damage=lambda name, width: measured.add(width) or 1 / width)
    search = search_over(bench, 2)
    search.run(None, 0.5)
    assert {2, 16} <= measured
    assert expected <= measured
    assert sorted(search.damages[module.name]) == [*range(2, 17, 2)]
    measured.clear()
    search = search_over(bench, 2)
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
    guess = search_of(tables)._guess(losses, allowed, *ends)
    assert ends[0] <= guess <= ends[1]


def test_trials_of_equal_loss_give_no_slope():
    tables = {"encoder.0.ffn": [3.0, 1.0, 0.5, 0.0]}
    search = search_of(tables)
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
    search = search_over(bench, units, 0.82)
    for asked in (keep, None):
        kept, _ = search.run(asked, 0.82 * keep)
        for name, width in widths_of(kept).items():
            assert width % units[name] == 0 or width == modules[name].width


def test_widths_that_were_measured_before_cost_no_evaluation():
    class Scripted(BudgetSearch):
        guesses = iter((0.76, 0.755, 0.752, 0.7, 0.63, 0.57, 0.51))

        def _guess(self, losses, allowed, fails, passes):
            return next(self.guesses)

    modules = {f"encoder.{number}.ffn": fake_module(f"encoder.{number}.ffn", 4, 1, False) for number in range(4)}
    bench = FakeBench(modules, lambda widths, whole: sum(widths.values()) / 32, damage=damage)
    trials = []
    search = search_over(bench, 1, kind=Scripted, on_trial=trials.append)
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
    search = search_over(bench, 4)
    kept, best = search.run(None, 0.45)
    assert best is None and widths_of(kept) == {"encoder.0.ffn": 4}
    assert search.trials == [] and not any(entry[0] == "full" for entry in bench.asked)


def decoder_search(keep, ap=0.5, **of_prices):
    """A search over a decoder layer whose attentions do little, and share a cost of 4, and an FFN."""
    names = ("decoder.0.self_attention", "decoder.0.cross_attention", "decoder.0.ffn")
    modules = {name: fake_module(name, width, 1, False) for name, width in zip(names, (8, 8, 16), strict=True)}
    bench = FakeBench(
        modules, constant(ap), damage=lambda name, width: (16 - width) * (100.0 if "ffn" in name else 1e-3)
    )
    shared = {"shared": (Shared(4.0, names[:2]),), **of_prices}
    search = search_over(bench, 1, min_units=0, of_prices=shared)
    search.prices = dataclasses.replace(search.prices, total=search.prices.total + 4.0)
    return search, search.run(keep, 0.45)


@pytest.mark.parametrize("kept", range(2, 15))
def test_a_shared_cost_that_no_module_uses_is_spent_on_the_others(kept):
    search, (_, best) = decoder_search(kept / 36)
    assert best.widths == {"decoder.0.self_attention": 0, "decoder.0.cross_attention": 0, "decoder.0.ffn": kept}
    assert best.kept_fraction == pytest.approx(kept / 36)
    assert search.prices.least == 0


def test_no_budget_is_exceeded_where_a_cost_is_shared():
    for keep in (0.1, 0.4, 0.6, 0.8, 1.0):
        search, (_, best) = decoder_search(keep)
        for trial in search.trials:
            used = any(width for name, width in trial.widths.items() if "attention" in name)
            assert trial.kept_fraction == pytest.approx((sum(trial.widths.values()) + 4 * used) / 36)
            assert trial.kept_fraction <= keep + 1e-9
        assert best.widths["decoder.0.ffn"] >= min(16, 36 * keep - 4 - 1)


def test_first_layers_alone_are_the_result_where_nothing_else_passes():
    whole = {"decoder.0.self_attention": 8, "decoder.0.cross_attention": 8, "decoder.0.ffn": 16}
    search, (kept, best) = decoder_search(None, ap=0.0, dropped=12.0)
    assert best.widths == whole == widths_of(kept) and best.full_ap == 0.5
    assert best.kept_fraction == best.keep == pytest.approx(24 / 36) and best is search.trials[0]
    _, (_, none) = decoder_search(None, ap=0.0)
    assert none is None


@pytest.mark.parametrize("below", [0.66, 0.5, 0.3])
def test_only_less_than_the_least_found_before_passes(below):
    search, (_, best) = decoder_search(None, dropped=12.0)
    assert best.kept_fraction < 0.3
    for ap in (0.5, 0.0):
        search, _ = decoder_search(None, ap=ap, dropped=12.0)
        search.trials.clear()
        _, found = search.run(None, 0.45, below)
        assert all(trial.keep < below for trial in search.trials)
        assert found is None if ap < 0.45 else found.kept_fraction < below
