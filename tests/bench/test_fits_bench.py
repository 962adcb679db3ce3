"""The benchmark of the fits on small sizes: both forms of each fit agree, and all fits of a search are counted."""

import sys

import pytest
import torch

from bench import fits
from bench.fits import LAYERS, Sizes, cases, common_keys_by_one_system
from bench.sentences import TEXTS
from bench.tables import TABLES
from pruning.least_squares import low_rank_products
from util.files import write_json

SMALL = Sizes(ffn=64, hidden=32, heads=4, tokens=128)


def test_all_widths_at_once_cost_what_each_costs_alone():
    (case,) = (case for case in cases(SMALL) if case.name == "63 widths of an FFN")
    before, after = case.before(), case.after()
    assert len(before) == 63 and max(before) > 0
    assert after == pytest.approx(before, rel=1e-6, abs=1e-9 * max(before))


def test_common_keys_are_the_same_by_one_system():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 9, 5, generator=generator, dtype=torch.float64)
    queries, keys = [*(x[:2].mT @ x[:2])], [*(x[2:].mT @ x[2:])]
    of_system, key = common_keys_by_one_system(queries, keys, 2)
    found, (common, _) = low_rank_products(queries, keys, 2, True)
    for one, other in zip(of_system, found, strict=True):
        torch.testing.assert_close(one.T @ key, other.T @ common, rtol=1e-5, atol=1e-6)


def test_the_figures_fill_the_table(tmp_path, monkeypatch):
    words = "--dim_feedforward 64 --hidden_dim 16 --nheads 2 --tokens 64 --rounds 1 --processes 1 2"
    monkeypatch.setattr(
        fits, "measure_processes", lambda sizes, count: {"processes": count, "cpu_seconds": [2.0 / count]}
    )
    found = fits.run(fits.get_parser().parse_args(words.split()))
    counts = {row["name"]: row["count"] for row in found["rows"]}
    assert counts["ranking of an FFN"] == 2 * LAYERS
    attentions = sum(count for name, count in counts.items() if "widths of a" in name and "FFN" not in name)
    assert attentions + counts["4 widths of common keys"] == 3 * LAYERS
    assert all(row["before"] > 0 and row["after"] > 0 for row in found["rows"])
    total = sum(row["count"] * row["before"] for row in found["rows"])
    assert found["search"]["before"] == pytest.approx(total)
    write_json(tmp_path / "fits.json", found)
    assert TABLES["fits"](tmp_path).count("\n") == len(found["rows"]) + 3
    assert "by the number of processes: 1: 2.0, 2: 1.0 (2.0 times less)." in " ".join(TEXTS["fits"](tmp_path).split())


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_processes_divide_the_ranking_and_pricing_of_ffns(monkeypatch):
    monkeypatch.setattr(fits, "START", "fork")
    on_main = sum(case.count for case in cases(SMALL) if not case.is_divided)
    found = fits.measure_processes(SMALL, 3)
    assert found["fits"] == [on_main + 8, 8, 8]  # the ranking and pricing of four of twelve FFNs
    assert found["processes"] == 3 and len(found["cpu_seconds"]) == 3 and min(found["cpu_seconds"]) > 0
