"""The decisions of a search, on modules without a network."""

import dataclasses

import pytest
import torch

from pruning.journal import Decision
from pruning.method import PAPER, VISIT
from pruning.schedule import GP, MGP
from pruning.search import Search, Units
from tests.pruning.fakes import FakeBench, constant, equal_heads, fake_module, fake_modules
from util.errors import UserError

UNITS = Units(attention_unit=1, ffn_unit=4, block_unit=8, attention_candidates=100, ffn_candidates=200, seed=0)
ATTENTION, FFN = "encoder.0.attention", "encoder.0.ffn"


def run(ap, schedule=MGP, units=UNITS, base_ap=0.5, replayed=(), modules=None, **bench_options):
    """The bench, the kept sets and the new decisions of a search over fake modules."""
    bench = FakeBench(modules or fake_modules(), ap, **bench_options)
    decisions = []
    kept = Search(bench, schedule, units, base_ap, decisions.append, replayed).run()
    return bench, kept, decisions


def widths(kept):
    return {name: len(next(iter(sets.values()))) for name, sets in kept.items()}


def asked(bench, kind):
    return [entry[1:] for entry in bench.asked if entry[0] == kind]


def test_a_detector_that_needs_nothing_keeps_one_unit_of_each_module():
    _, kept, decisions = run(constant(0.5))
    assert widths(kept) == {ATTENTION: 2, FFN: 4}
    assert [d.accepted for d in decisions] == [True, True]


def test_a_detector_that_needs_everything_keeps_everything():
    bench, kept, decisions = run(lambda w, whole: 0.5 if w == {ATTENTION: 8, FFN: 6} else 0.0)
    assert widths(kept) == {ATTENTION: 8, FFN: 6}
    assert [(d.module, d.width, d.accepted) for d in decisions] == [
        (ATTENTION, 2, False),
        (ATTENTION, 4, False),
        (ATTENTION, 6, False),
        (ATTENTION, 8, True),
        (FFN, 4, False),
        (FFN, 6, True),
    ]
    # The last unit is all that is left: nothing to score, and a whole module changes no mAP.
    assert [entry[1] for entry in asked(bench, "score")] == [0, 2, 4, 0]
    assert not asked(bench, "full")
    assert decisions[-1].full_ap == 0.5


def test_width_is_the_least_that_reaches_the_target():
    _, kept, _ = run(lambda w, whole: 0.5 if w[ATTENTION] >= 6 else 0.1)
    assert widths(kept)[ATTENTION] == 6


def test_modules_not_visited_yet_stay_whole():
    seen = []
    run(lambda w, whole: seen.append(dict(w)) or 0.5)
    assert seen[0] == {ATTENTION: 2, FFN: 6}
    assert seen[-1] == {ATTENTION: 2, FFN: 4}


def test_after_the_subset_has_passed_only_the_whole_split_is_asked():
    bench, kept, decisions = run(lambda w, whole: 0.5 if not whole or w[ATTENTION] >= 6 else 0.3)
    assert asked(bench, "subset")[:2] == [(ATTENTION, 2), (FFN, 4)]
    assert asked(bench, "full")[:3] == [(ATTENTION, 2), (ATTENTION, 4), (ATTENTION, 6)]
    assert widths(kept)[ATTENTION] == 6
    assert [d.subset_ap for d in decisions[:3]] == [0.5, None, None]


def test_the_whole_split_is_not_asked_before_the_subset_passes():
    bench, _, decisions = run(lambda w, whole: 0.5 if w[ATTENTION] >= 4 else 0.1)
    assert asked(bench, "full")[0] == (ATTENTION, 4)
    assert decisions[0].full_ap is None


def test_a_whole_split_that_never_passes_fills_the_module():
    _, kept, decisions = run(lambda w, whole: 0.5 if not whole else 0.0)
    assert widths(kept) == {ATTENTION: 8, FFN: 6}
    assert all(d.full_ap == 0.5 for d in decisions if d.accepted)


@pytest.mark.parametrize(("full_ap", "accepted"), [(0.4501, True), (0.4499, False)])
def test_mgp_holds_the_whole_split_against_the_base(full_ap, accepted):
    _, _, decisions = run(lambda w, whole: full_ap if whole else 0.5)
    assert decisions[0].accepted is accepted


@pytest.mark.parametrize(("full_ap", "accepted"), [(0.4852, True), (0.4850, False)])
def test_gp_holds_the_whole_split_against_the_target(full_ap, accepted):
    """The second module's target is 0.495; 0.98 of it are 0.4851."""
    _, _, decisions = run(lambda w, whole: full_ap if w[FFN] < 6 and whole else 0.5, schedule=GP)
    assert next(d for d in decisions if d.module == FFN).accepted is accepted


def test_a_whole_module_keeps_the_map_of_the_previous_visit():
    _, _, decisions = run(lambda w, whole: 0.495 if w[FFN] == 6 else 0.0)
    assert [(d.module, d.full_ap) for d in decisions if d.accepted] == [(ATTENTION, 0.495), (FFN, 0.495)]


def test_a_base_of_zero_accepts_one_unit():
    _, kept, _ = run(constant(0.0), schedule=GP, base_ap=0.0)
    assert widths(kept) == {ATTENTION: 2, FFN: 4}


def test_a_unit_beyond_the_module_keeps_it_whole_without_a_score():
    bench, kept, _ = run(constant(0.0), units=dataclasses.replace(UNITS, attention_unit=9, ffn_unit=100))
    assert widths(kept) == {ATTENTION: 8, FFN: 6}
    assert not asked(bench, "score")


def test_the_best_channels_of_each_head_are_added():
    wanted = torch.tensor([3.0, 0, 2, 1, 7, 6, 4, 5])
    scores = lambda name, candidates: wanted[candidates].double()  # noqa: E731
    ap = lambda w, whole: 0.5 if w[ATTENTION] >= 4 else 0.0  # noqa: E731
    _, kept, _ = run(ap, scores=scores)
    assert kept[ATTENTION]["query"].tolist() == [1, 3, 6, 7]
    assert kept[ATTENTION]["value"].tolist() == [1, 3, 6, 7]


def test_heads_stay_equal_with_few_candidates():
    units = dataclasses.replace(UNITS, attention_candidates=1)
    bench, kept, _ = run(lambda w, whole: 0.5 if w[ATTENTION] >= 6 else 0.0, units=units)
    assert equal_heads(kept[ATTENTION], 4)
    assert all(count == 2 for *_, count in asked(bench, "score")[:3])


def test_candidates_depend_on_seed_module_and_step_alone():
    def drawn(seed):
        seen = []
        scores = lambda name, candidates: seen.append(candidates.tolist()) or candidates.double()  # noqa: E731
        units = dataclasses.replace(UNITS, attention_candidates=4, ffn_unit=1, ffn_candidates=2, seed=seed)
        run(lambda w, whole: 0.5 if w[ATTENTION] >= 6 and w[FFN] >= 4 else 0.0, units=units, scores=scores)
        return seen

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_decisions_come_before_the_next_step():
    bench = FakeBench(fake_modules(), lambda w, whole: 0.5 if w[ATTENTION] >= 4 else 0.0)
    lengths = []
    Search(bench, MGP, UNITS, 0.5, lambda d: lengths.append(len(bench.asked))).run()
    assert lengths == sorted(set(lengths))


def one_ffn(width):
    return {FFN: fake_module(FFN, width, 1, False)}


@pytest.mark.parametrize("width", [1, 2, 4, 5, 17, 30])
def test_bisection_finds_the_least_width_that_passes_in_a_logarithm_of_tries(width):
    units = dataclasses.replace(UNITS, ffn_unit=4)
    for needed in range(width + 1):
        ap = lambda w, whole, needed=needed: 0.5 if w[FFN] >= needed else 0.0  # noqa: E731
        bench, kept, decisions = run(ap, units=units, modules=one_ffn(width), method=VISIT)
        multiples = [min(width, 4 * count) for count in range(1, -(-width // 4) + 1)]
        assert widths(kept)[FFN] == next(w for w in multiples if w >= needed) == bench.widths[FFN]
        assert len(asked(bench, "subset")) <= (len(multiples) - 1).bit_length()
        assert len(asked(bench, "full")) <= len(asked(bench, "subset"))
        assert [d.accepted for d in decisions] == [False] * (len(decisions) - 1) + [True]
        assert decisions[-1].width == widths(kept)[FFN]
        assert decisions[-1].full_ap == 0.5


def test_a_bisection_asks_the_whole_split_only_where_the_subset_passes():
    bench, _, decisions = run(lambda w, whole: 0.5 if w[ATTENTION] >= 6 else 0.1, method=VISIT)
    assert asked(bench, "full")[0] == (ATTENTION, 6)
    first = decisions[0]
    assert (first.width, first.subset_ap, first.full_ap, first.accepted) == (4, 0.1, None, False)


def test_a_bisection_measures_no_whole_module():
    bench, kept, decisions = run(lambda w, whole: 0.5 if w == {ATTENTION: 8, FFN: 6} else 0.0, method=VISIT)
    assert widths(kept) == {ATTENTION: 8, FFN: 6} == bench.widths
    assert [d.full_ap for d in decisions if d.accepted] == [0.5, 0.5]
    assert all(d.width < d.full_width for d in decisions if not d.accepted)


def test_a_bisection_reports_the_map_of_the_accepted_width():
    ap = lambda w, whole: 0.4 + 0.01 * sum(w.values()) if whole else 0.54  # noqa: E731
    _, kept, decisions = run(ap, method=VISIT, base_ap=0.54)
    accepted = [d for d in decisions if d.accepted]
    # 0.9 of the base are 0.486: four channels may go.
    assert widths(kept) == {ATTENTION: 4, FFN: 6}
    assert [d.full_ap for d in accepted] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("method", [PAPER, VISIT], ids=["grow", "bisect"])
def test_an_map_that_is_just_what_is_asked_for_passes(method):
    exact = dataclasses.replace(MGP, map_tol=0.0, skip=0.0)
    _, kept, decisions = run(constant(0.5), exact, base_ap=0.5, method=method)
    assert {d.target_ap for d in decisions} == {0.5} and widths(kept) == {ATTENTION: 2, FFN: 4}


def test_a_bisection_leaves_the_bench_with_what_it_accepted():
    """The last width tried need not be the one that is taken."""
    seen = []
    ap = lambda w, whole: seen.append(dict(w)) or (0.5 if w[ATTENTION] >= 4 else 0.0)  # noqa: E731
    bench, kept, _ = run(ap, method=VISIT)
    assert [w for w in seen if w[FFN] == 6][-1][ATTENTION] == 2
    assert {w[ATTENTION] for w in seen if w[FFN] < 6} == {4}
    assert bench.widths == widths(kept)


def plain(decisions):
    """Decisions without what differs from run to run."""
    return [{k: v for k, v in d.to_dict().items() if k != "seconds"} for d in decisions]


HISTORIES = [
    lambda w, whole: 0.5 if w[ATTENTION] >= 4 and w[FFN] >= 3 else 0.1,
    lambda w, whole: 0.5 if not whole or w[ATTENTION] >= 6 else 0.3,
    lambda w, whole: 0.5 if w == {ATTENTION: 8, FFN: 6} else 0.0,
    constant(0.5),
]


@pytest.mark.parametrize("schedule", [GP, MGP], ids=["gp", "mgp"])
@pytest.mark.parametrize("method", [PAPER, VISIT], ids=["grow", "bisect"])
@pytest.mark.parametrize("ap", HISTORIES)
def test_a_search_resumed_after_any_decision_ends_the_same(ap, method, schedule):
    units = dataclasses.replace(UNITS, ffn_unit=1, attention_candidates=4, ffn_candidates=3)
    scores = lambda name, candidates: (candidates * 5 % 7).double()  # noqa: E731
    whole_bench, expected, history = run(ap, schedule, units, method=method, scores=scores)
    for cut in range(len(history) + 1):
        replayed = [Decision.from_dict(d.to_dict()) for d in history[:cut]]
        bench, kept, new = run(ap, schedule, units, replayed=replayed, method=method, scores=scores)
        assert [
            (d["visit"], d["step"], d["kept"], d["subset_ap"], d["full_ap"], d["accepted"]) for d in plain(new)
        ] == [
            (d["visit"], d["step"], d["kept"], d["subset_ap"], d["full_ap"], d["accepted"])
            for d in plain(history[cut:])
        ]
        assert bench.widths == whole_bench.widths
        for name, sets in expected.items():
            assert all(torch.equal(indices, kept[name][part]) for part, indices in sets.items())
        for kind in ("subset", "full", "score"):
            again = asked(bench, kind)
            assert again == asked(whole_bench, kind)[len(asked(whole_bench, kind)) - len(again) :]
        measured = sum(d.subset_ap is not None for d in new)
        assert len(asked(bench, "subset")) == measured


def test_counts_continue_from_the_last_decision():
    _, _, history = run(constant(0.5))
    past = dataclasses.replace(history[0], image_passes=70, whole_passes=1.5, seconds=9.0)
    _, _, new = run(constant(0.5), replayed=[past])
    assert (new[0].image_passes, new[0].whole_passes) == (70, 1.5)
    assert new[0].seconds >= 9


@pytest.mark.parametrize("change", [{"step": 1}, {"visit": 1}, {"module": FFN}])
def test_decisions_of_another_search_are_refused(change):
    _, _, history = run(constant(0.5))
    with pytest.raises(UserError, match="journal: found step"):
        run(constant(0.5), replayed=[dataclasses.replace(history[0], **change)])


@pytest.mark.parametrize("method", [PAPER, VISIT], ids=["paper", "visit"])
@pytest.mark.parametrize("needed", [1, 5, 9, 16, 21])
def test_widths_are_multiples_of_the_units_or_whole(method, needed):
    """With `--attention_unit 4 --ffn_unit 8`, head widths fit every kernel."""
    units = Units(attention_unit=3, ffn_unit=5, block_unit=8, attention_candidates=5, ffn_candidates=7, seed=0)
    modules = {ATTENTION: fake_module(ATTENTION, 2 * 11, 2, True), FFN: fake_module(FFN, 22, 1, False)}
    ap = lambda w, whole: 0.5 if min(w.values()) >= needed else 0.0  # noqa: E731
    _, kept, decisions = run(ap, units=units, modules=modules, method=method)
    assert equal_heads(kept[ATTENTION], 11)
    assert {d.width for d in decisions if d.module == ATTENTION} <= {6, 12, 18, 22}
    assert {d.width for d in decisions if d.module == FFN} <= {5, 10, 15, 20, 22}
    assert widths(kept) == {
        ATTENTION: min(w for w in (6, 12, 18, 22) if w >= needed),
        FFN: min(w for w in (5, 10, 15, 20, 22) if w >= needed),
    }
