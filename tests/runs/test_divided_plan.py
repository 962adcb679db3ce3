"""The plan of a search whose fits are divided among processes: seconds of the busiest, and all fits counted."""

import pytest

from pruning.config import SearchConfig
from runs.search_counts import Images, Rates, SampledModule, SearchTally
from tests.pruning.fakes import fake_module
from util import distributed
from util.phases import FITS

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
