"""The decisions of a search, on modules without a network."""

import dataclasses

import pytest
import torch

from pruning.schedule import GP, MGP
from pruning.search import Search, Units
from tests.pruning.fakes import FakeBench, constant, equal_heads, fake_modules

UNITS = Units(attention_unit=1, ffn_unit=4, attention_candidates=100, ffn_candidates=200, seed=0)
ATTENTION, FFN = "encoder.0.attention", "encoder.0.ffn"


def run(ap, schedule=MGP, units=UNITS, base_ap=0.5, **bench_options):
    bench = FakeBench(fake_modules(), ap, **bench_options)
    decisions = []
    kept = Search(bench, schedule, units, base_ap, decisions.append).run()
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


def test_a_whole_module_hands_on_the_map_of_the_visit_before():
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
