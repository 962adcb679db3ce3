"""Reconstruction of residual blocks: its memory, its passes, its halves of the images, and what a bench saves of it."""

import copy

import pytest
import torch

from pruning.block_reconstruction import passes_of_fit, second_half
from pruning.method import METHODS
from pruning.nested_sets import chains
from pruning.reconstruction import LEVELS
from pruning.scores import Elimination
from pruning.selection import order_channels
from pruning.workbench import DetectorBench, Passes, SearchImages
from tests.pruning.block_setting import CPU, DETECTORS, Setting, batches_of, random_kept, random_sets, setting_of
from tests.pruning.tiny import randomise_norms, tiny_detector


@pytest.mark.parametrize("level", LEVELS)
def test_memory_changes_no_result(level):
    fitted = []
    for storage in ({}, {"max_bytes": 0}, {"max_bytes": 3e5}):
        setting = Setting(DETECTORS["basic"], **storage)
        damages = setting.cut(level, random_sets(setting))
        fitted.append((damages, {k: v.clone() for k, v in setting.model.state_dict().items()}))
        assert storage == {} or setting.cache.nbytes <= storage["max_bytes"]
    for damages, weights in fitted[1:]:
        assert damages == fitted[0][0]
        assert all(torch.equal(value, fitted[0][1][key]) for key, value in weights.items())


def test_two_caches_share_the_memory_that_is_left():
    setting = Setting(DETECTORS["basic"])
    cache, features_bytes = setting.cache, setting.cache.nbytes
    other = cache.twin(copy.deepcopy(setting.model))
    cache.move_to(setting.blocks[2])
    list(cache.states())
    of_states = cache.nbytes - features_bytes
    assert of_states > 0 and other.nbytes == cache.nbytes
    assert other.position == setting.blocks[0] and cache.position == setting.blocks[2]
    other.move_to(setting.blocks[2])
    list(other.states())
    assert other.nbytes == cache.nbytes == features_bytes + 2 * of_states
    other.forget()
    assert other.nbytes == cache.nbytes == features_bytes + of_states


@pytest.mark.parametrize("level", LEVELS[1:])
def test_after_the_blocks_no_state_of_the_unpruned_detector_is_held(level):
    setting = Setting(DETECTORS["basic"])
    reconstruction, kept = setting.reconstruction(level), random_sets(setting)
    held = {}
    for name in [*setting.blocks, "encoder.0.attention"]:
        setting.begin(reconstruction, name)
        reconstruction.apply(kept[name])
        held[name] = setting.cache.nbytes
    alone = Setting(DETECTORS["basic"])
    alone.cache.move_to("encoder.0.attention")
    list(alone.cache.states())
    assert held["encoder.0.attention"] == alone.cache.nbytes
    assert held[setting.blocks[-1]] > alone.cache.nbytes


def test_the_ranking_and_the_prices_of_a_block_run_only_the_pruned_detector():
    setting = Setting(DETECTORS["basic"])
    reconstruction = setting.reconstruction("full")
    first, second = setting.blocks[:2]
    setting.begin(reconstruction, first)
    reconstruction.apply(random_kept(setting.modules[first], 0.5))
    module = setting.begin(reconstruction, second)
    setting.cache.counter.images_by_range.clear()
    order = order_channels(module, Elimination(reconstruction), "backward", 1, False)
    reconstruction.damages({2: order.kept(2), 4: order.kept(4)})
    images = setting.cache.images
    assert setting.cache.counter.images_by_range == {(first, second): images, (second, setting.blocks[2]): images}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_images_without_features_pass_as_often_as_is_logged(kind, level):
    setting = Setting(DETECTORS[kind], max_bytes=0)
    reconstruction, counter, images = setting.reconstruction(level), setting.cache.counter, setting.cache.images
    found = []
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        before = counter.backbone_images
        reconstruction.apply(random_kept(module, 0.5))
        found.append((counter.backbone_images - before) / images)
    assert max(found) == passes_of_fit(level, len(module.parts) + 1)
    assert setting.cache.images_without_features() == images
    assert setting.cache.images_without_features([2]) == 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_half_of_the_images_has_one_whatever_their_ids(count):
    for first in range(50):
        ids = [*range(first, first + count)]
        half = second_half(ids)
        assert half == second_half(ids[::-1])
        assert len(half) == count // 2 and half < set(ids)


def test_damages_of_few_images_are_measured_on_images_that_the_fit_has_not_seen():
    name = setting_of(DETECTORS["basic"]).blocks[0]
    for groups in (((0, 1),), ((0,), (1,))):
        setting = Setting(DETECTORS["basic"], batches_of(groups))
        reconstruction = setting.reconstruction("output")
        module = setting.begin(reconstruction, name)
        assert all(float(half.weight) > 0 for half in reconstruction._blocks._halves_of(module.parts[-1]))


def test_a_single_calibration_image_is_a_warning(capsys):
    for groups, warned in ((((0,),), True), (((0, 1),), False)):
        setting = Setting(DETECTORS["basic"], batches_of(groups))
        setting.reconstruction("output")
        assert ("--calibration_images: found 1 image" in capsys.readouterr().out) == warned


def test_kept_sets_are_divided_into_chains():
    sets = {1: torch.tensor([2]), 3: torch.tensor([1, 2, 4]), 2: torch.tensor([2, 4]), 4: torch.tensor([0, 1, 2, 3])}
    assert [list(chain) for chain in chains(sets)] == [[1, 2, 3], [4]]


def test_a_bench_loads_what_it_saved_to_the_last_bit_and_continues():
    model, criterion, postprocessors = tiny_detector(DETECTORS["bottleneck"])
    randomise_norms(model)
    images = SearchImages(batches_of(), range(3), None, 1, 1, 3)
    shares = dict.fromkeys(model.steps_in("detector"), 1.0)
    bench = DetectorBench(model, criterion, postprocessors["bbox"], images, shares, scope="detector",
                          method=METHODS["fast"], passes=Passes(CPU, 8))  # fmt: skip
    kept = {name: random_kept(module, 0.5) for name, module in bench.modules.items()}
    *names, last = model.block_names

    def state():
        gates = [g for module in bench.modules.values() for g in module.layer.gate(module.block)]
        return [*(t.clone() for t in model.state_dict().values()), *(g for g in gates if g is not None)]

    for name in names:
        bench.begin(name)
        bench.set_kept(name, kept[name])
    saved, cut = bench.save(), state()
    bench.begin(last)
    bench.set_kept(last, kept[last])
    more = state()
    bench.reset()
    bench.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(state(), cut, strict=True))
    bench.begin(last)
    bench.set_kept(last, kept[last])
    assert all(torch.equal(a, b) for a, b in zip(state(), more, strict=True))
    assert bench.counter.moment_macs > 0
    assert bench.uncached_fits() == (0, 7)
