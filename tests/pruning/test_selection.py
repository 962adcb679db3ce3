"""From scores to kept sets, on modules that only know their widths."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.kept_channels import add, all_kept, missing, none_kept
from pruning.selection import DIRECTIONS, Order, best_of_each_head, draw_candidates, order_channels
from tests.pruning.fakes import equal_heads, fake_module
from tests.pruning.samples import quick

ATTENTION = fake_module("encoder.0.attention", 32, 4, True)
FFN = fake_module("encoder.0.ffn", 30, 1, False)


@pytest.mark.parametrize(
    ("module", "count", "unit", "expected"),
    [
        (ATTENTION, 100, 4, [8, 8, 8, 8]),
        (ATTENTION, 10, 4, [3, 3, 2, 2]),
        (ATTENTION, 1, 8, [2, 2, 2, 2]),
        (FFN, 200, 16, [30]),
        (FFN, 7, 4, [7]),
        (FFN, 7, 16, [16]),
    ],
)
def test_candidates_are_spread_over_heads_and_suffice_for_a_unit(module, count, unit, expected):
    drawn = draw_candidates(module, none_kept(module), count, unit, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn // (module.width // module.nheads)).tolist() == expected
    assert torch.equal(drawn, drawn.unique(sorted=True))


def test_kept_channels_are_no_candidates():
    kept = add(none_kept(ATTENTION), torch.tensor([0, 8, 16, 24]))
    drawn = draw_candidates(ATTENTION, kept, 100, 4, torch.Generator())
    assert torch.equal(drawn, missing(ATTENTION, kept))
    assert len(drawn) == 28


def test_the_lowest_scores_win_in_each_head():
    candidates = torch.arange(32)
    scores = (candidates * 7 % 32).double()
    best = best_of_each_head(ATTENTION, candidates, scores, 8)
    for head in range(4):
        of_head = scores[head * 8 : head * 8 + 8]
        chosen = [c for c in best.tolist() if c // 8 == head]
        assert sorted(scores[chosen].tolist()) == sorted(of_head.tolist())[:2]
    assert equal_heads(add(none_kept(ATTENTION), best), 8)


def fixed_scores(seed, seen=None):
    """A ranking by one random number for each channel and part, which notes what it is asked in `seen`."""
    generator = torch.Generator().manual_seed(seed)
    table = {part: torch.rand(64, generator=generator, dtype=torch.float64) for part in ("query", "value", "hidden")}

    def ranking(module, joined, kept, candidates):
        if seen is not None:
            seen.append((joined, {part: indices.clone() for part, indices in kept.items()}, candidates))
        return sum(table[part] for part in joined)[candidates]

    return ranking, table


@st.composite
def fake_modules(draw):
    """An attention, deformable or not, or an FFN, of any width."""
    if draw(st.booleans()):
        nheads, is_deformable = draw(st.integers(1, 4)), draw(st.booleans())
        return fake_module("encoder.0.attention", nheads * draw(st.integers(1, 9)), nheads, True, is_deformable)
    return fake_module("encoder.0.ffn", draw(st.integers(1, 40)), 1, False)


@quick
@given(
    module=fake_modules(),
    direction=st.sampled_from(DIRECTIONS),
    unit=st.integers(1, 3),
    share=st.booleans(),
    max_steps=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_kept_sets_of_an_order_are_nested_and_of_equal_heads(module, direction, unit, share, max_steps, seed):
    ranking, _ = fixed_scores(seed)
    order = order_channels(module, ranking, direction, unit * module.nheads, share, max_steps)
    head_width = module.width // module.nheads
    kept = [order.kept(count * module.nheads) for count in range(1, head_width + 1)]
    for count, one in enumerate(kept, start=1):
        assert tuple(one) == module.parts
        assert equal_heads(one, head_width)
        assert all(len(indices) == count * module.nheads for indices in one.values())
        assert all(torch.equal(indices, indices.unique(sorted=True)) for indices in one.values())
    for less, more in itertools.pairwise(kept):
        assert all(torch.isin(less[part], more[part]).all() for part in less)
    assert all(torch.equal(indices, all_kept(module)[part]) for part, indices in kept[-1].items())
    if share:
        assert all(torch.equal(indices, kept[0][module.parts[0]]) for indices in kept[0].values())


@quick
@given(module=fake_modules(), direction=st.sampled_from(DIRECTIONS), share=st.booleans(), seed=st.integers(0, 1000))
def test_scores_that_do_not_change_are_sorted_in_each_head(module, direction, share, seed):
    ranking, table = fixed_scores(seed)
    order = order_channels(module, ranking, direction, module.nheads, share)
    head_width = module.width // module.nheads
    for width in range(module.nheads, module.width + 1, module.nheads):
        for part, indices in order.kept(width).items():
            score = sum(table[p] for p in module.parts) if share else table[part]
            for head in range(module.nheads):
                of_head = score[head * head_width : (head + 1) * head_width]
                chosen = indices[indices // head_width == head] - head * head_width
                expected = of_head.argsort()[: width // module.nheads]
                assert torch.equal(chosen, expected.sort().values)


@pytest.mark.parametrize("share", [True, False])
def test_backward_ranks_what_is_left_and_forward_what_is_missing(share):
    for direction in ("backward", "forward"):
        seen = []
        ranking, _ = fixed_scores(0, seen)
        order_channels(ATTENTION, ranking, direction, 8, share)
        assert len(seen) == (4 if share else 8)
        for joined, kept, candidates in seen:
            assert joined == (("query", "value") if share else joined)
            for part in ("query", "value"):
                if part not in joined:
                    assert torch.equal(kept[part], torch.arange(32))
            if direction == "backward":
                assert torch.equal(candidates, kept[joined[0]])
            else:
                assert torch.equal(candidates, missing(ATTENTION, {joined[0]: kept[joined[0]]}))
        counts = [len(candidates) for joined, _, candidates in seen if joined[0] == "query"]
        assert counts == [32, 24, 16, 8]


def test_once_scores_the_whole_module_in_one_go():
    seen = []
    order_channels(ATTENTION, fixed_scores(0, seen)[0], "once", 4, True)
    assert [len(candidates) for *_, candidates in seen] == [32]


def test_the_number_of_steps_is_bounded():
    seen = []
    order_channels(fake_module("encoder.0.ffn", 60, 1, False), fixed_scores(0, seen)[0], "backward", 1, True, 7)
    assert len(seen) == 7


def test_the_natural_order_keeps_the_first_channels_of_each_head():
    kept = Order.natural(ATTENTION).kept(8)
    assert kept["query"].tolist() == kept["value"].tolist() == [0, 1, 8, 9, 16, 17, 24, 25]
    assert Order.natural(FFN).kept(7)["hidden"].tolist() == list(range(7))
