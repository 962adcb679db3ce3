"""Batches of the split that are divided by image size: the loss, its gradients and rankings are those of the batch."""

import pytest
import torch

from pruning.gates import gate_vector
from pruning.kept_channels import add, none_kept
from pruning.scores import ExactLoss, GateGradient
from tests.pruning.block_setting import CPU, DETECTORS, GROUPS, Setting, batches_of

COUNTS = (1, 4, 2, 0, 7)  # boxes of the images, so that groups have other numbers for each image than the batch
ONE_SIZE = ((96, 96),) * len(COUNTS)


def joined(batches):
    """Images and targets of several batches."""
    return [[item for batch in batches for item in batch[side]] for side in (0, 1)]


@pytest.mark.parametrize("images_at_once", [1, 7])
@torch.no_grad()
def test_the_exact_loss_is_that_of_the_whole_first_batch(images_at_once):
    setting = Setting(DETECTORS["basic"], batches_of(counts=COUNTS), numbers=(0, 0, 1))
    images, targets = joined(setting.batches[:2])
    exact = ExactLoss(setting.model, setting.criterion, setting.cache, device=CPU, images_at_once=images_at_once)
    for name in (setting.blocks[1], "encoder.0.ffn"):
        module = setting.modules[name]
        setting.cache.move_to(name)
        kept, candidates = add(none_kept(module), torch.tensor([2, 3])), torch.tensor([0, 1, 5])
        scores = exact(module, module.parts, kept, candidates)
        for channel, score in zip(candidates, scores, strict=True):
            gate = gate_vector(kept[module.parts[0]], module.width, CPU)
            gate[channel] = 1
            module.set_gate(gate)
            loss = setting.criterion.weighted_sum(setting.criterion(setting.model(images), targets))
            assert float(score) == pytest.approx(float(loss), rel=1e-5)
        module.set_gate(None)


def test_gradients_do_not_depend_on_how_a_batch_is_divided():
    found = []
    for groups in (((0, 1, 2, 3, 4),), ((0, 3), (1, 2, 4)), ((4,), (1,), (3,), (0,), (2,))):
        setting = Setting(DETECTORS["basic"], batches_of(groups, ONE_SIZE, COUNTS), numbers=(0,) * len(groups))
        module = setting.modules[setting.blocks[1]]
        setting.cache.move_to(module.name)
        channels = torch.arange(module.width)
        kept = dict.fromkeys(module.parts, channels)
        fisher = GateGradient(setting.calibration, 2)(module, module.parts, kept, channels)
        found.append((setting.calibration.loss, setting.calibration.sensitivities, fisher))
    for loss, sensitivities, fisher in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(fisher, found[0][2], rtol=1e-3, atol=1e-6)
        for name, one in sensitivities.items():
            assert one.level == pytest.approx(found[0][1][name].level, rel=1e-3)
            torch.testing.assert_close(one.metric, found[0][1][name].metric, rtol=1e-3, atol=1e-5)


def test_an_image_has_the_weight_of_its_own_batch():
    """Two batches of the split: the loss is the mean of theirs, whatever the sizes of the images."""
    setting = Setting(DETECTORS["basic"], batches_of(GROUPS, counts=COUNTS), numbers=(0, 0, 1))
    losses = []
    for parts in ((0, 1), (2,)):
        images, targets = joined([setting.batches[part] for part in parts])
        with torch.no_grad():
            loss = setting.criterion.weighted_sum(setting.criterion(setting.model(images), targets))
        losses.append(len(images) * float(loss))
    assert setting.calibration.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
