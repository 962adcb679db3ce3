"""The plan of a search whose fits are divided among processes: seconds of the busiest, and all fits counted."""

import pytest

from pruning.budget import cuts_at_most
from pruning.config import SearchConfig
from runs.search_counts import Images, Rates, SampledModule, SearchTally
from tests.pruning.fakes import fake_module
from util import distributed
from util.phases import FITS, MAP

WIDTHS = range(1, 8)


@pytest.mark.parametrize(("processes", "share"), [(1, 1.0), (2, 2 / 3), (3, 1 / 3), (4, 1 / 3)])
def test_the_seconds_of_fits_are_those_of_the_busiest_process(monkeypatch, processes, share):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    modules = {name: fake_module(name, 8, 1, False) for name in (f"encoder.{number}.ffn" for number in range(3))}
    modules["encoder.0.attention"] = fake_module("encoder.0.attention", 8, 2, True)
    costs = {
        "encoder.ffn": SampledModule("encoder.1.ffn", 8, 2, first={FITS: (len(WIDTHS), 6.0)}),
        "encoder.attention": SampledModule("encoder.0.attention", 8, 2, more={FITS: (1, 0.5)}, first={FITS: (1, 0.5)}),
    }
    images = Images(read=0, own=0, calibrated=2, first_batch=0, subset_attention=0, subset_ffn=0, everywhere=0)
    widths = {name: list(WIDTHS) for name in modules}
    widths["encoder.0.attention"].append(8)
    shares = dict.fromkeys(modules, 0.25)
    tally = SearchTally(SearchConfig(keep=[0.5]), images, Rates(0, 0, 0, 0, 0), modules, widths, shares, costs)
    tally.by_budget([], [])
    of_attention = len(WIDTHS)
    assert tally.counts[FITS] == 3 * len(WIDTHS) + of_attention
    assert tally.seconds[FITS] == pytest.approx(3 * 6.0 * share + 0.5 * of_attention)


@pytest.mark.parametrize("left", [["decoder.0.ffn"], ["encoder.0.ffn"]])
def test_layers_whose_modules_were_removed_before_count_as_layers_to_drop(left):
    modules = {name: fake_module(name, 8, 1, False) for name in left}
    costs = {
        f"{name.split('.')[0]}.ffn": SampledModule(name, 8, 2, first={FITS: (len(WIDTHS), 6.0)}) for name in modules
    }
    images = Images(read=0, own=0, calibrated=2, first_batch=0, subset_attention=0, subset_ffn=0, everywhere=5)
    widths, shares = {name: list(WIDTHS) for name in modules}, dict.fromkeys([*left, "decoder.2.ffn"], 0.5)
    config = SearchConfig(keep=[0.5], min_dec_layers=1)
    tally = SearchTally(config, images, Rates(0, 0, 0, 0, 0), modules, widths, shares, costs)
    tally.by_budget([], [])
    most = 3
    assert tally.counts[FITS] == most * len(WIDTHS)
    assert tally.counts[MAP] == (most + most * cuts_at_most(1, config.min_units)) * images.everywhere
