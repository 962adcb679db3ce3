"""Fold batch norms into the convolutions before them, for faster inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.detector import Detector


@torch.no_grad()
def fold_norms(detector: Detector) -> None:
    """Fold the batch norms of a detector's backbone into its convolutions, in place.

    The outputs of eval mode stay the same up to rounding. The result is for inference only: it has other parameters
    than its checkpoint. On a CPU, weights are stored channels last, with which convolutions are faster there.
    """
    backbone = detector.backbone[0]
    body = backbone.body
    _fold(body["conv1"], body["bn1"])
    body["bn1"] = nn.Identity()
    for block in backbone.residual_blocks().values():
        for number, (convolution, norm) in enumerate(block.convolutions() if block.width else [], 1):
            _fold(convolution, norm)
            block.add_module(f"bn{number}", nn.Identity())
        if isinstance(block.downsample, nn.Sequential):
            _fold(*block.downsample.children())
            block.downsample[1] = nn.Identity()
    if next(backbone.parameters()).device.type == "cpu":
        backbone.to(memory_format=torch.channels_last)


def folded_copy(detector: Detector) -> Detector:
    """Return a copy of a detector in eval mode with folded batch norms, see `fold_norms`."""
    folded = copy.deepcopy(detector).eval()
    fold_norms(folded)
    return folded


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    assert isinstance(convolution, nn.Conv2d)
    values = norm.state_dict()
    eps: Any = norm.eps
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, values["running_mean"], values["running_var"], eps, values["weight"],
        values["bias"],
    )  # fmt: skip
