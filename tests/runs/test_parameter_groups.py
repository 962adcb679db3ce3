"""Which parameters get weight decay and which learning rate."""

import pytest
import torch
from torch import nn

from runs.training_state import parameter_groups, undecayed_parameters
from tests.pruning.tiny import VARIANTS, tiny_detector

# What the detectors are made of; a module of another kind fails the test, so that somebody decides about it.
VECTORS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm, nn.PReLU, nn.Embedding)


@pytest.mark.parametrize("decayed", ["all", "matrices"])
@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_every_trained_parameter_is_in_one_group(network, decayed):
    model = tiny_detector(network)[0]
    groups = parameter_groups(model, 2.0, 1.0, decayed)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trained
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    assert all((id(p) in backbone) == (group["lr"] == 1) for group in groups for p in group["params"])


@pytest.mark.parametrize("network", [*VARIANTS.values(), "--batch_norm_type BatchNorm2d --num_patterns 2"])
def test_norms_biases_embeddings_and_prelu_do_not_decay(network):
    model = tiny_detector(network)[0]
    groups = parameter_groups(model, 2.0, 1.0, "matrices")
    without = {id(p) for group in groups if group.get("weight_decay") == 0 for p in group["params"]}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept_out = isinstance(module, VECTORS) or name.endswith("bias") or name == "level_embed"
            assert kept_out == (id(parameter) in without) or not parameter.requires_grad, f"{module_name}.{name}"
    assert [group["lr"] for group in groups] == [2, 1, 2, 1]


def test_a_step_without_gradients_shrinks_the_decayed_matrices_alone():
    model = tiny_detector("")[0]
    groups = parameter_groups(model, 0.1, 0.1, "matrices")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    torch.optim.AdamW(groups, weight_decay=0.5).step()
    kept_out = undecayed_parameters(model)
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter in kept_out or not parameter.requires_grad else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)
