"""Convolutions and their batch norms as linear layers over patches, for least-squares fits.

A convolution and the batch norm after it are one linear layer over patches of C * kh * kw inputs. A fit over the whole
receptive field is converted back to the convolution's weight and the batch norm's bias, so the network's form does not
change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pruning.moments import Moments

LARGEST_GROWTH = 1e3  # of an output channel's weight in a fit, relative to the mean of its convolution


def norm_scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm2d or FrozenBatchNorm2d in eval mode, as float64 on the CPU."""
    state = {name: tensor.double().cpu() for name, tensor in norm.state_dict().items()}
    weight, bias, mean, variance = (state[name] for name in ("weight", "bias", "running_mean", "running_var"))
    assert isinstance(norm.eps, float)
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - mean * scale


def as_linear(convolution: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight D x (C * kh * kw) and bias D of a convolution and its batch norm, as one layer over patches."""
    scale, shift = norm_scale_and_shift(norm)
    weight = scale[:, None] * convolution.weight.detach().double().cpu().flatten(1)
    if convolution.bias is not None:
        shift = shift + scale * convolution.bias.detach().double().cpu()
    return weight, shift


def kernel_area(convolution: nn.Conv2d) -> int:
    """Return kh * kw, the inputs of one output for each channel."""
    return convolution.kernel_size[0] * convolution.kernel_size[1]


def inputs_of_channels(channels: Tensor, area: int) -> Tensor:
    """Return the inputs of channels, `area` = kh * kw for each."""
    return (channels[:, None] * area + torch.arange(area)).flatten()


def one_sided(targets: Tensor, predicted: Tensor) -> Tensor:
    """Return targets for the next fit of a layer followed by a ReLU, given the outputs of the last fit.

    Where a target is not above 0, any output not above 0 is as good. Alternating this with fits, each damped towards
    the last one, never increases the squared error without such outputs (majorisation).
    """
    return torch.where(targets > 0, targets, predicted.clamp(max=0))


def convolution_weights(
    layers: Sequence[tuple[nn.Conv2d, nn.Module]],
    kept: Sequence[Tensor],
    fitted: Tensor,
    constant: Tensor,
    moments: Moments,
) -> tuple[list[Tensor], Tensor]:
    """Convert a fit over the patches of several convolutions, whose outputs are added, to their weights.

    Where a batch norm scales an output channel to nearly 0, the fit would need huge weights: the channel keeps its
    weights and gets the best constant. Scales of other channels do not matter.

    Args:
        layers: convolutions of equally many outputs, each with its batch norm.
        kept: the input channels of each convolution that were fitted.
        fitted: D x inputs, the fitted weights of all convolutions and their batch norms, side by side.
        constant: D, the fitted constant of the sum.
        moments: moments of the fit.

    Returns:
        For each convolution its weight for the fitted channels, D x kept x kh x kw, and the bias of the first batch
        norm; float64 on the CPU.
    """
    scales, shifts = zip(*(norm_scale_and_shift(norm) for _, norm in layers), strict=True)
    old = [layer.weight.detach().double().cpu()[:, channels] for (layer, _), channels in zip(layers, kept, strict=True)]
    parts = fitted.split([weight[0].numel() for weight in old], 1)
    is_dead = torch.stack([_needs_huge_weights(*layer) for layer in zip(parts, scales, old, strict=True)]).any(0)
    start = torch.cat([scale[:, None] * weight.flatten(1) for scale, weight in zip(scales, old, strict=True)], 1)
    best = (moments.y - start @ moments.x) / moments.weight
    constant = torch.where(is_dead, best, constant)
    weights = []
    for part, scale, weight in zip(parts, scales, old, strict=True):
        divided = (part / scale.masked_fill(is_dead, 1.0)[:, None]).view_as(weight)
        weights.append(torch.where(is_dead[:, None, None, None], weight, divided))
    # The shift contains the norm's bias; its other terms stay.
    bias = layers[0][1].state_dict()["bias"].double().cpu() + constant - torch.stack(shifts).sum(0)
    for (convolution, _), scale in zip(layers, scales, strict=True):
        if convolution.bias is not None:
            bias = bias - scale * convolution.bias.detach().double().cpu()
    return weights, bias


def _needs_huge_weights(fitted: Tensor, scale: Tensor, old: Tensor) -> Tensor:
    """Return for each output channel whether `fitted` (D x inputs) divided by its scale is out of proportion.

    Args:
        old: weight of the convolution before the fit, D x kept x kh x kw.
    """
    usual = old.flatten(1).square().sum(1).mean().sqrt()
    return (scale == 0) | (fitted.square().sum(1).sqrt() > LARGEST_GROWTH * usual * scale.abs())
