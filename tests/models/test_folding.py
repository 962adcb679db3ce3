"""Folded batch norms: a detector without them gives the same."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from models.folding import fold_norms
from models.residual import ResidualBlock
from pruning.transplant import cut_state_dict, slim_copy, widths_after
from tests.pruning.tiny import VARIANTS, pictures, randomise_norms, tiny_detector

NETWORKS = {
    **VARIANTS,
    "bottlenecks": "--backbone resnet50 --return_layer layer3",
    "dilated": "--backbone resnet50 --dilation",
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("norm", ["FrozenBatchNorm2d", "BatchNorm2d"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_detector_gives_the_same_without_its_batch_norms(network, norm, is_cut):
    """Also one with a block of 3 channels, and one without any."""
    model = tiny_detector(f"{NETWORKS[network]} --batch_norm_type {norm}")[0].eval()
    randomise_norms(model)
    if is_cut:
        modules = model.prunable_modules("detector")
        kept = {
            name: {part: torch.arange(modules[name].width)[-width:] if width else torch.arange(0)
                   for part in modules[name].parts}
            for name, width in zip(model.block_names, (3, 0), strict=False)
        }  # fmt: skip
        state = cut_state_dict(model.state_dict(), kept, modules)
        model = slim_copy(model, state, widths_after(model.widths_in("detector"), kept)).eval()
    folded = copy.deepcopy(model)
    fold_norms(folded)
    assert not [m for m in folded.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert folded.widths_in("detector") == model.widths_in("detector")
    blocks = [m for m in folded.backbone.modules() if isinstance(m, ResidualBlock)]
    assert min(block.width for block in blocks) == (0 if is_cut else min(map(min, model.backbone[0].widths)))
    images, _ = pictures()
    with torch.no_grad():
        expected, found = model(images), folded(images)
        features = [m.backbone[0](images[0][None], m.stages) for m in (model, folded)]
    for one, other in zip(*features, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


def test_nothing_but_norms_is_folded():
    model = tiny_detector()[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("backbone")}
    fold_norms(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
