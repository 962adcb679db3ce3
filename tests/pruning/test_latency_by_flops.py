"""Latency tables by a clock without noise, which counts operations: what a module's time has of its neighbours'."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruning import latency
from pruning.cost_tables import widths_of
from pruning.latency import cut_copy, random_images
from pruning.step_timing import FRONT, HEADS, steps_of
from tests.pruning.test_latency_table import CPU, SETTING, UNITS, measurement_for
from tests.pruning.tiny import tiny_detector


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


def test_work_that_two_modules_share_is_saved_only_with_the_last_of_them(monkeypatch):
    model = tiny_detector("--dec_layers 3")[0].eval()
    widths = {name: max(of_module) for name, of_module in widths_of(model, "transformer", UNITS).items()}
    table = measured_by_flops(model, "transformer", monkeypatch)

    def without(*blocks):
        return {name: 0 if name.endswith(blocks) else width for name, width in widths.items()}

    assert {len(of_module) for of_module in widths_of(model, "transformer", UNITS).values()} == {5}
    for removed in (without("none"), without("self_attention"), without("ffn"), without("self_attention", "ffn")):
        assert table.milliseconds(removed) == pytest.approx(true_time(model, "transformer", removed))
    # The positions of the queries stay in the self-attention's time, though only a cross-attention uses them.
    for blocks in (("cross_attention",), ("attention",)):
        assert table.milliseconds(without(*blocks)) > true_time(model, "transformer", without(*blocks))


@pytest.mark.parametrize("removed", ["encoder.0.attention", "decoder.1.cross_attention", "encoder.1.ffn",
                                     "backbone.layer3.0"])  # fmt: skip
def test_what_is_left_of_a_removed_module_counts_as_rest(removed, monkeypatch):
    widths = tiny_detector("--enc_layers 2")[0].widths_in("detector").replace(removed, 0)
    model = tiny_detector("--enc_layers 2", cfgs=widths)[0].eval()
    table = measured_by_flops(model, "detector", monkeypatch)
    assert {*table.rest} == {FRONT, HEADS, removed}
    whole = {name: module.width for name, module in model.prunable_modules("detector").items()}
    assert table.milliseconds(whole) == pytest.approx(true_time(model, "detector", whole))
