"""Latency tables by a clock without noise, which counts operations: what a module's time has of its neighbours'."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruning import latency
from pruning.config import SearchConfig
from pruning.cost import cost_of
from pruning.cost_tables import latency_prices, prices_of, widths_of
from pruning.latency import cut_copy, random_images
from pruning.step_timing import FRONT, HEADS, steps_of
from tests.pruning.test_latency_table import CPU, SETTING, UNITS, measurement_for
from tests.pruning.tiny import VARIANTS, tiny_detector


def flops(steps, device, amp, *, repeats, warm_up=1, graphs=False):
    """Operations instead of milliseconds: without noise, and they depend on what else is removed."""
    found, state = {}, None
    with torch.no_grad():
        for name, run in steps:
            with FlopCounterMode(display=False) as counter:
                state = run(state)
            found[name] = [counter.get_total_flops() / 1e6 + 0.001] * repeats
    return found


def measured_by_flops(model, scope, monkeypatch):
    """The table after the least number of rounds."""
    measurement = measurement_for(model, scope)
    monkeypatch.setattr(latency, "time_steps", flops)
    for _ in range(latency.ROUNDS[0] * measurement.turns_in_round):
        measurement.add(measurement.measure())
    return measurement.table()


def true_time(model, scope, widths):
    steps = steps_of(cut_copy(model, scope, widths), random_images(SETTING, CPU), scope)
    return sum(value for (value,) in flops(steps, CPU, "off", repeats=1).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prediction_is_what_runs_whatever_is_removed(variant, monkeypatch):
    """Also the positions of queries, which are computed for those attentions of a layer that are left."""
    model = tiny_detector(f"{VARIANTS[variant]} --dec_layers 3")[0].eval()
    table = measured_by_flops(model, "transformer", monkeypatch)
    widths = {name: max(of_module) for name, of_module in widths_of(model, "transformer", UNITS).items()}

    def without(*blocks, layers=""):
        return {
            name: 0 if name.endswith(blocks) and name.startswith(layers) else width for name, width in widths.items()
        }

    attentions = ("self_attention", "cross_attention")
    for removed in (
        without("none"), without("self_attention"), without("cross_attention"), without("ffn"), without(*attentions),
        without(*attentions, layers=("decoder.0", "decoder.2")), without("self_attention", layers="decoder.1"),
        without("cross_attention", layers="decoder.0"), without("attention", "ffn"),
    ):  # fmt: skip
        assert table.milliseconds(removed) == pytest.approx(true_time(model, "transformer", removed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fractions_of_a_budget_are_those_of_what_runs(variant, monkeypatch):
    model = tiny_detector(VARIANTS[variant])[0].eval()
    widths = widths_of(model, "transformer", UNITS)
    config = SearchConfig(cost="macs")
    tables = {
        "latency": latency_prices(measured_by_flops(model, "transformer", monkeypatch), widths),
        "macs": prices_of(config, UNITS, model, SETTING.image_size_hw),
    }
    for cost, prices in tables.items():
        draw, whole = random.Random(0), {name: max(of_module) for name, of_module in widths.items()}
        of_rest = true_time(model, "transformer", whole) - prices.total
        for _ in range(8):
            removed = {name: draw.choice([0, 0, *table]) for name, table in prices.costs.items()}
            if cost == "macs":
                slim = tiny_detector(VARIANTS[variant], cfgs=widths_after_cut(model, removed))[0]
                left = 1e9 * cost_of(slim, SETTING.image_size_hw).gmacs
            else:
                left = true_time(model, "transformer", removed) - of_rest
            assert prices.kept_fraction(removed) == pytest.approx(left / prices.total)
        assert prices.least == pytest.approx(prices.kept_fraction(dict.fromkeys(widths, 0)) * prices.total)


def widths_after_cut(model, widths):
    """The widths of a detector with these of its modules."""
    found = model.widths
    for name, width in widths.items():
        found = found.replace(name, width)
    return found


@pytest.mark.parametrize("removed", ["encoder.0.attention", "decoder.1.cross_attention", "encoder.1.ffn",
                                     "backbone.layer3.0"])  # fmt: skip
def test_what_is_left_of_a_removed_module_counts_as_rest(removed, monkeypatch):
    widths = tiny_detector("--enc_layers 2")[0].widths_in("detector").replace(removed, 0)
    model = tiny_detector("--enc_layers 2", cfgs=widths)[0].eval()
    table = measured_by_flops(model, "detector", monkeypatch)
    assert {*table.rest} == {FRONT, HEADS, removed}
    whole = {name: module.width for name, module in model.prunable_modules("detector").items()}
    assert table.milliseconds(whole) == pytest.approx(true_time(model, "detector", whole))
