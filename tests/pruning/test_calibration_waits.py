"""On a GPU the CPU waits for no sum of a batch: moments, gradients and checks stay there until the last batch."""

import collections

import pytest
import torch

from pruning.calibration import Calibration
from pruning.moments import Moments
from pruning.reconstruction import Reconstruction
from pruning.scores import Elimination
from pruning.selection import order_channels
from pruning.state_cache import PassCounter, StateCache
from tests.other_device import DEVICE, OtherDevice, held
from tests.pruning.block_setting import CPU, DETECTORS, batches_of
from tests.pruning.tiny import ListedBatches, randomise_norms, tiny_detector

WORDS = DETECTORS["bottleneck"]
NAMES = ("backbone.layer3.0", "encoder.0.attention", "encoder.0.ffn", "decoder.1.cross_attention")
SPLITS = {2: ((0, 1), (2, 3)), 4: ((0,), (1,), (2,), (3,))}
COPIES_PER_BATCH = 4  # to the device: weights and positions of the tokens, which are kept on the CPU


def test_sums_of_batches_are_copied_to_the_cpu_once():
    x, weights = torch.randn(60, 7), torch.rand(60)
    expected = Moments.of(x, x[:, :3], weights).add_(Moments.of(x, x[:, :3], weights))
    with OtherDevice() as other:
        there, weights_there = x.to(DEVICE), weights.to(DEVICE)
        other.waits.clear()
        sums = Moments.of(there, there[:, :3], weights_there)
        sums = sums.add_(Moments.of(there, there[:, :3], weights_there))
        assert not other.waits
        found = Moments.over_processes(sums)
        assert len(other.waits) == len(found._sums())
    for mine, others in zip(found._sums(), expected._sums(), strict=True):
        assert mine.device == CPU and torch.equal(mine, others)


def damages(device, groups):
    """The damage of each of `NAMES` at half of its width, and the waits of the gradients and of its ranking and fit."""
    model, criterion, _ = tiny_detector(WORDS)
    randomise_norms(model)
    model.eval(), criterion.eval()
    found, waits = {}, {}
    with OtherDevice() as other:
        if device == DEVICE:
            other.move(model), other.move(criterion)
        given = [([image.to(device) for image in images], targets) for images, targets in batches_of(groups)]
        counter = PassCounter(dict.fromkeys(model.steps_in("detector"), 1.0))
        cache = StateCache(model, ListedBatches(given), counter, device=device, scope="detector")
        other.waits.clear()
        reconstruction = Reconstruction(Calibration(model, criterion, cache, range(len(given)), device), "full")
        waits["gradients"] = collections.Counter(wait for wait in other.waits if "_local_scalar_dense" in wait)
        for name in NAMES:
            module = model.prunable_modules("detector")[name]
            cache.move_to(name)
            reconstruction.begin(name)
            other.waits.clear()
            with torch.no_grad():
                order = order_channels(module, Elimination(reconstruction), "backward", module.nheads, False)
            found[name] = reconstruction.apply(order.kept(module.width // 2))
            waits[name] = collections.Counter(wait.split(":")[0] for wait in other.waits)
            reconstruction.restore(name)
    return {name: float(held(damage)) for name, damage in found.items()}, waits


def test_fits_are_those_of_the_cpu_and_more_batches_need_no_more_sums():
    (found, of_two), (_, of_four) = (damages(DEVICE, groups) for groups in SPLITS.values())
    expected, none = damages(CPU, SPLITS[2])
    assert found == pytest.approx(expected, rel=1e-6) and not any(none.values())
    assert min(found.values()) > 0
    assert of_four.pop("gradients") == of_two.pop("gradients")  # no number is read for a batch
    for name in NAMES:
        assert of_four[name]["util/distributed.py"] == of_two[name]["util/distributed.py"] > 0
        passes = 6 if name.startswith("backbone") else 3
        assert sum(of_four[name].values()) - sum(of_two[name].values()) <= 2 * COPIES_PER_BATCH * passes, of_four[name]
