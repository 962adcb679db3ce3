"""Memory that the fits of a search take: the estimate against what is measured."""

import pytest
import torch

from pruning import fit_memory as planned
from pruning.cache_plan import CacheOptions, CachePlanner, Uses, shape_of
from pruning.cache_setup import cache_uses
from pruning.config import SearchConfig
from pruning.convolution_moments import positions_per_image
from pruning.fit_memory import fit_memory
from pruning.scores import Elimination
from pruning.selection import order_channels
from tests.pruning.block_setting import CPU, DETECTORS, Setting, batches_of, random_kept
from util import distributed
from util.errors import UserError
from util.memory import PeakMemory, storage_bytes

GROUPS, SIZES = ((0, 1), (2, 3)), ((64, 64),) * 4
BATCHES = [(2, 1.0), (2, 1.0)]
LARGE = {  # up to 576 inputs of a convolution, whose moments take more than the images
    "basic": "--batch_norm_type BatchNorm2d --return_layer layer4",
    "bottleneck": "--backbone resnet_tiny_bottleneck --return_layer layer4",
}


@pytest.fixture(scope="module", params=LARGE)
def setting(request):
    return Setting(LARGE[request.param], batches_of(GROUPS, SIZES))


def maps_of(setting):
    """Rows and columns at the input of each block."""
    return {name: tuple(setting.inputs_of(name)[0].shape[-2:]) for name in setting.blocks}


def test_ranking_pricing_and_fitting_take_what_is_planned(setting):
    found = fit_memory(setting.model, "detector", maps_of(setting), BATCHES, 4)
    reconstruction, peaks = setting.reconstruction("full"), []
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        list(setting.cache.states())
        with PeakMemory() as ranking, torch.no_grad():
            order = order_channels(module, Elimination(reconstruction), "backward", 1, False)
        halves = reconstruction._blocks._halves.values()
        held = sum(storage_bytes(half._sums()) for pair in halves for half in pair)
        widths = {width: order.kept(width) for width in range(0, module.width, 8)}
        for work, kept in ((reconstruction.damages, widths), (reconstruction.apply, order.kept(module.width // 2))):
            with PeakMemory() as memory:
                work(kept)
            peaks.append(held + memory.peak_bytes)
        peaks.append(ranking.peak_bytes)
    assert 0.5 * found.ram < max(peaks) < found.ram + 0.1 * found.device


def test_a_gpu_holds_the_sums_before_they_are_copied(setting):
    plain, found = (
        fit_memory(setting.model, "detector", maps_of(setting), BATCHES, 4, sums_on_device=on) for on in (False, True)
    )
    reconstruction, held = setting.reconstruction("full"), []
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        order_channels(module, Elimination(reconstruction), "backward", 1, False)
        halves = reconstruction._blocks._halves.values()
        held.append(sum(storage_bytes(half._sums()) for pair in halves for half in pair))
    metrics = sum(sensitivity.metric.nbytes for sensitivity in setting.calibration.sensitivities.values())
    assert found.ram == plain.ram
    assert max(held) < found.device - plain.device < 3 * (max(held) + metrics)


def test_targets_and_gradients_have_the_planned_rows(setting):
    maps, reconstruction = maps_of(setting), setting.reconstruction("full")
    first, name = setting.blocks[0], setting.blocks[-1]
    setting.begin(reconstruction, first)
    reconstruction.apply(random_kept(setting.modules[first], 0.5))
    module = setting.begin(reconstruction, name)
    layers = [*planned._layers_of(module, maps[name], BATCHES, 4)]
    blocks = reconstruction._blocks
    blocks._measure_targets(range(1, len(layers) + 1))
    held = sum(target.nbytes for batch in blocks._targets for target in batch)
    assert held == 4 * sum(layer.rows * layer.outputs for layer in layers)
    for number, layer in enumerate(layers, 1):
        weights = setting.calibration.sensitivities[f"{name}.bn{number}"].token_weights
        assert sum(batch.numel() for batch in weights) == layer.rows
    blocks.end()


def test_the_estimate_grows_with_what_is_kept():
    setting = Setting(DETECTORS["basic"], batches_of(GROUPS, SIZES))

    def found(batches, scope="detector"):
        maps = maps_of(setting) if scope == "detector" else {}
        return fit_memory(setting.model, scope, maps, batches, sum(count for count, _ in batches))

    whole, transformer = found(BATCHES), found(BATCHES, "transformer")
    assert found([(4, 1.0)]) == whole
    more = found([(4, 1.0), (400, 1.0)])
    assert more.ram > whole.ram and more.device > whole.device
    larger = found([(4, 4.0)])
    assert larger.ram > whole.ram and larger.device > whole.device
    assert 0 < transformer.ram < whole.ram and transformer == found([], "transformer")


def test_a_process_plans_the_rows_that_it_draws_of_the_images_of_all(monkeypatch):
    """64 of 512 images: the draw divides the rows of a fit by all images."""
    setting = Setting(LARGE["basic"], batches_of(GROUPS, SIZES))
    config, shapes = SearchConfig(scope="detector"), [shape_of([(800, 1066)] * 2)] * 32

    def uses_of(processes):
        monkeypatch.setattr(distributed, "gather_objects", lambda own: [own] * processes)
        return cache_uses(config, shapes, 512, range(32), range(32), num_workers=0, detections=1)

    assert [uses_of(processes).calibrated_images for processes in (1, 8)] == [64, 512]
    name, maps_hw = setting.blocks[-1], (400, 533)
    for layer in planned._layers_of(setting.modules[name], maps_hw, [(2, 1.0)] * 32, 512):
        assert layer.rows == 64 * positions_per_image(layer.inputs, 10**9, 512)
    maps = dict.fromkeys(setting.blocks, maps_hw)
    one, of_eight = (fit_memory(setting.model, "detector", maps, [(2, 1.0)] * 32, count) for count in (64, 512))
    assert of_eight.device < one.device and of_eight.ram < one.ram


def test_the_plan_divides_by_the_calibration_images_of_all_processes(setting):
    with torch.no_grad():
        front = setting.model.front(setting.batches[0][0], "detector")
    found = fit_memory(setting.model, "detector", maps_of(setting), BATCHES, 400)
    _, work = planner_of(setting, fits_layers=True, calibrated_images=400).measure(front, 0)
    assert work.fits == found.ram < fit_memory(setting.model, "detector", maps_of(setting), BATCHES, 4).ram


def planner_of(setting, options=None, **uses):
    shapes = [shape_of(SIZES[:2])] * 2
    uses = {"images_at_once": 1, "reading": 0.0, "evaluation": 0.0, "images": 4, "calibrated_images": 4, **uses}
    return CachePlanner(setting.model, Uses(shapes, range(2), range(2), **uses), options or CacheOptions(), CPU)


def test_the_gradients_of_an_image_take_what_is_planned(setting):
    images, _ = setting.batches[0]
    with torch.no_grad():
        one = setting.model.front(images[:1], "detector")
    taken = planner_of(setting, fits_layers=True)._backward_bytes(one)
    assert taken == pytest.approx(setting.calibration._backward._image_bytes, rel=0.25)
    assert taken > planner_of(setting)._backward_bytes(one)


def test_fits_are_part_of_the_plan_and_of_its_error(setting, monkeypatch):
    with torch.no_grad():
        front = setting.model.front(setting.batches[0][0], "detector")
    found = fit_memory(setting.model, "detector", maps_of(setting), BATCHES, 4)
    _, without = planner_of(setting).measure(front, 0)
    _, work = planner_of(setting, fits_layers=True).measure(front, 0)
    assert work.fits == found.ram and without.fits == 0
    assert work.passes >= without.passes + found.device
    planner = planner_of(setting, CacheOptions(), fits_layers=True)
    monkeypatch.setattr("pruning.cache_plan.free_bytes", lambda device: 0.5 * planner._beside(CPU, work))
    monkeypatch.setattr("pruning.cache_plan.GB", 1e6)
    with pytest.raises(UserError, match=rf"{found.ram / 1e6:.1f} GB for fits, .* fewer --search_images"):
        planner(front, 0)
