"""Which process fits which module, and that all processes have what one would find."""

import pytest
import torch

from models.residual import BLOCK
from pruning.divided_fits import (
    DividedFits,
    busiest_share,
    cost_of_fits,
    fit_everywhere,
    inputs_of_fits,
    most_held_elements,
    owners,
)
from pruning.fit_memory import fit_memory
from tests.pruning.fakes import fake_module
from tests.pruning.tiny import tiny_detector
from util import distributed
from util.phases import FITS, PhaseClock


def ffns(*widths):
    return {f"{number}.ffn": fake_module(f"{number}.ffn", width, 1, False) for number, width in enumerate(widths)}


def test_the_largest_fit_goes_first_to_the_process_with_least_to_do():
    assert owners(ffns(3, 4, 5, 6), 2) == {"3.ffn": 0, "2.ffn": 1, "1.ffn": 1, "0.ffn": 1}  # 216 and 216
    assert owners(ffns(8, 8, 8, 8, 8), 2) == {"0.ffn": 0, "1.ffn": 1, "2.ffn": 0, "3.ffn": 1, "4.ffn": 0}
    assert set(owners(ffns(3, 4, 5, 6), 1).values()) == {0}
    assert sorted(owners(ffns(3, 4), 5).values()) == [0, 1]
    assert owners({}, 3) == {}
    assert busiest_share(ffns(3, 4, 5, 6), 2) == 0.5
    assert busiest_share(ffns(*[8] * 12), 4) == 0.25 and busiest_share(ffns(3, 4), 1) == 1
    assert busiest_share({}, 2) == 0


def test_attentions_cost_nothing_since_each_width_takes_passes():
    modules = {"attention": fake_module("attention", 8, 2, True), **ffns(8, 8)}
    assert inputs_of_fits(modules["attention"]) == [] and cost_of_fits(modules["attention"]) == 0
    assert {owners(modules, 2)[name] for name in ("0.ffn", "1.ffn")} == {0, 1}


@pytest.mark.parametrize(
    ("words", "inputs"), [("", {9}), ("--backbone resnet_tiny_bottleneck --return_layer layer3", {9, 1})]
)
def test_a_block_costs_the_patches_of_its_later_convolutions(words, inputs):
    model, _, _ = tiny_detector(words)
    modules = model.prunable_modules("detector")
    blocks = [module for module in modules.values() if module.kind == BLOCK]
    for module in blocks:
        found = inputs_of_fits(module)
        assert len(found) == len(module.parts) == len(inputs)
        assert {count // module.width for count in found} == inputs
    assert inputs_of_fits(modules["encoder.0.ffn"]) == [32]


def test_a_process_holds_the_moments_of_its_own_modules():
    model, _, _ = tiny_detector("")
    modules = model.prunable_modules("detector")
    all_of_it = sum(
        (2 if module.kind == BLOCK else 1) * inputs**2
        for module in modules.values()
        for inputs in inputs_of_fits(module)
    )
    held = {count: most_held_elements(modules, count) for count in (1, 2, 3, 50)}
    assert held[1] == 0 and all_of_it / 2 <= held[2] < all_of_it and held[2] >= held[3] >= held[50] > 0
    maps = dict.fromkeys(model.block_names, (4, 4))
    one, two = (fit_memory(model, "detector", maps, [(2, 1.0)], 2, count) for count in (1, 2))
    assert two.ram == one.ram + 8 * held[2] and two.device == one.device


def test_a_single_process_fits_each_module_at_once():
    done, fits, clock = [], DividedFits(ffns(8, 8)), PhaseClock(torch.device("cpu"))
    with clock.running():
        for name in ("0.ffn", "1.ffn"):
            fits.add(name, lambda name=name: done.append(name) or name.upper(), 3)
            assert done[-1] == name
        assert fits.results() == {"0.ffn": "0.FFN", "1.ffn": "1.FFN"}
        assert fit_everywhere(lambda: done.append("again") or 5, 2) == 5
    assert done == ["0.ffn", "1.ffn", "again"] and clock.count(FITS) == 8


def test_one_of_several_keeps_and_computes_only_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(
        distributed, "gather_objects", lambda own: [(None, {"0.ffn": "of 0", "2.ffn": "of 0"}, None), own]
    )
    modules = {**ffns(8, 8, 8), "attention": fake_module("attention", 8, 2, True)}
    assert owners(modules, 2)["attention"] == 1
    fits, clock, done = DividedFits(modules), PhaseClock(torch.device("cpu")), []
    with clock.running():
        for name in modules:
            fits.add(name, lambda name=name: done.append(name) or "of 1", 3)
        assert not done and [name for name, fit in fits._fits.items() if fit] == ["1.ffn", "attention"]
        found = fits.results()
    assert done == ["1.ffn", "attention"] and [*found] == [*modules]
    assert found == {"0.ffn": "of 0", "1.ffn": "of 1", "2.ffn": "of 0", "attention": "of 1"}
    assert clock.count(FITS) == 9  # widths of all FFNs, whoever computes them
