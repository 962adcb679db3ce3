"""Latency tables: the positions of queries, which the attentions of a decoder layer share."""

import dataclasses
import itertools
import json

import pytest

from pruning.cost_tables import latency_prices
from pruning.latency_table import Entry, check_table, read_table
from tests.pruning.test_latency_table import SETTING, table_of, written
from util.errors import UserError


def table_with_positions(both, of_self, of_cross):
    """A table of a decoder layer's attentions, with the time of positions by the attentions that use them."""
    used_by = {"self_attention and cross_attention": both, "self_attention": of_self, "cross_attention": of_cross}
    entries = {users: Entry(ms, 0.0, 1) for users, ms in used_by.items() if ms is not None}
    table = table_of({f"decoder.0.{block}": {0: 0.5, 8: 2.0} for block in ("self_attention", "cross_attention")})
    kinds = {**table.kinds, "decoder.0.positions": "p"}
    return dataclasses.replace(table, kinds=kinds, positions={"p": entries})


@pytest.mark.parametrize("times", [(3.0, 2.0, 1.5), (3.0, 4.0, 1.5), (3.0, 1.0, 1.0), (3.0, None, None)])
def test_positions_count_as_measured_for_the_attentions_that_use_them(times):
    """Noise may make them slower for one attention than for both, or for both than for each together."""
    both, of_self, of_cross = times
    table, names = table_with_positions(*times), ("decoder.0.self_attention", "decoder.0.cross_attention")

    def positions(*widths):
        modules = sum(2.0 if width else 0.5 for width in widths)
        return table.milliseconds(dict(zip(names, widths, strict=True))) - modules - 4.0

    assert positions(8, 8) == pytest.approx(both) and positions(0, 0) == 0
    least = 0.0 if None in times else max(0.0, both - of_cross) + max(0.0, both - of_self)
    for found, alone in ((positions(8, 0), of_self), (positions(0, 8), of_cross)):
        assert 0 <= found <= both
        if least <= both and alone is not None:
            assert found == pytest.approx(min(both, alone))
    prices = latency_prices(table, {name: [0, 8] for name in names})
    assert prices.total == pytest.approx(table.milliseconds(dict.fromkeys(names, 8)))
    for widths in itertools.product((0, 8), repeat=2):
        chosen = dict(zip(names, widths, strict=True))
        assert prices.kept_fraction(chosen) == pytest.approx(table.milliseconds(chosen) / prices.total)


def test_a_table_without_the_positions_of_both_attentions_is_refused():
    table, widths = table_with_positions(3.0, 2.0, 1.5), {f"decoder.0.{b}_attention": [0, 8] for b in ("self", "cross")}
    check_table(table, table.kinds, widths, "a file")
    for positions in ({}, {"p": {"self_attention": Entry(1.0, 0.0, 1)}}):
        with pytest.raises(UserError, match=r"found no time of decoder\.0\.positions for self_attention and cross_att"):
            check_table(dataclasses.replace(table, positions=positions), table.kinds, widths, "a file")


def test_a_table_of_an_older_version_is_refused_in_one_sentence(tmp_path):
    path = written(table_with_positions(3.0, 2.0, 1.5), tmp_path / "latency.json")
    older = json.loads(path.read_text())
    del older["positions"]
    path.write_text(json.dumps(older))
    with pytest.raises(
        UserError, match=r"latency\.json: found no times of the positions of queries, .* older versions"
    ):
        read_table(path, SETTING, "detector")


def test_a_table_with_positions_is_read_as_it_was_written(tmp_path):
    table = table_with_positions(3.0, 2.0, 1.5)
    assert read_table(written(table, tmp_path / "latency.json"), SETTING, "detector") == table
