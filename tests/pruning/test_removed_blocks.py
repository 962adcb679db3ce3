"""Residual blocks of which a cut leaves only a constant: its value and its predicted damage."""

import math

import pytest
import torch

from pruning.kept_channels import none_kept
from pruning.reconstruction import LEVELS
from pruning.scores import RandomOrder
from pruning.selection import order_channels
from tests.pruning.test_block_reconstruction import every_position, setting  # noqa: F401


@torch.no_grad()
def test_a_removed_block_adds_the_weighted_mean_of_its_branch(setting, every_position):  # noqa: F811
    for name in setting.blocks:
        module = setting.modules[name]
        number, branches = len(module.parts) + 1, []
        setting.reconstruction("output")
        inputs = setting.inputs_of(name)
        branches = [module.layer.pre_activation(number, x).flatten(2).transpose(1, 2).flatten(0, 1) for x in inputs]
        of_norm = setting.calibration.sensitivities[f"{name}.bn{number}"]
        weights = torch.cat([of_tokens.sqrt().flatten() for of_tokens in of_norm.token_weights])[:, None].double()
        mean = (weights * torch.cat(branches).double()).sum(0) / weights.sum()
        reconstruction = setting.reconstruction("output")
        setting.begin(reconstruction, name)
        damage = reconstruction.apply(none_kept(module))
        found = module.layer.pre_activation(number, inputs[0])
        torch.testing.assert_close(found, mean.float()[:, None, None].expand_as(found), atol=1e-4, rtol=1e-4)
        wrong = torch.cat(branches).double() - mean
        error = (weights * (wrong @ of_norm.metric * wrong).sum(1, keepdim=True)).sum() / weights.sum()
        assert damage == pytest.approx(of_norm.level * float(error), rel=1e-3)
        reconstruction.restore(name)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_removed_block_is_priced_by_the_error_at_its_output_alone(setting, level):  # noqa: F811
    reconstruction = setting.reconstruction(level)
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        order = order_channels(module, RandomOrder(0), "once", 1, share_sets=True)
        damages = reconstruction.damages({width: order.kept(width) for width in (0, 1, module.width // 2)})
        assert 0 < damages[module.width // 2] < damages[0] < math.inf
        if len(module.parts) == 1:  # with two, a kept channel's errors count at two convolutions
            assert damages[1] <= 1.01 * damages[0]
        reconstruction.restore(name)
