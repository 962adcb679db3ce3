"""Fits of the convolution behind pruned channels: a residual block is made to add what it added, as far as it can.

The convolution and the batch norm behind it are one linear layer over patches. Its weight for the kept channels is
refitted by least squares over the whole receptive field, a block's targets being what the whole network has behind the
block, less what the cut network brings along the identity path: so each block also repairs what the blocks before it
broke. The constant goes into the batch norm's bias. Channels leave in the order of least damage, kh * kw inputs each,
the others refitted each time; damage is judged in the metric of the loss's gradients at the batch norm's output, as for
an attention or an FFN, so that one budget serves all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pruning.fit import Surgeon, error_covariance, refit
from pruning.moments import DAMPING, Moments, square_root

ELIMINATION_STEPS = 32  # in which all channels of a convolution go, at most
LEAST_SCALE = 1e-3  # of the largest, of a batch norm's channel whose convolution is refitted


def norm_scale_and_shift(norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode, frozen or not, multiplies with and then adds, float64 on the CPU."""
    state = {name: tensor.double().cpu() for name, tensor in norm.state_dict().items()}
    weight, bias, mean, variance = (state[name] for name in ("weight", "bias", "running_mean", "running_var"))
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - mean * scale


def as_linear(convolution: nn.Conv2d, norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight D x (C * kh * kw) and bias D of a convolution and the batch norm behind it, as one layer over patches."""
    scale, shift = norm_scale_and_shift(norm)
    weight = scale[:, None] * convolution.weight.detach().double().cpu().flatten(1)
    if convolution.bias is not None:
        shift = shift + scale * convolution.bias.detach().double().cpu()
    return weight, shift


def inputs_of_channels(channels: Tensor, area: int) -> Tensor:
    """The inputs that belong to channels, `area` = kh * kw for each."""
    return (channels[:, None] * area + torch.arange(area)).flatten()


def order_channels(weight: Tensor, moments: Moments, metric: Tensor, area: int, least: int = 0) -> Tensor:
    """Input channels of a convolution from the first to keep to the last, by elimination with refits.

    Args:
        weight: D x (C * area), from which channels are taken away.
        moments: of its inputs.
        metric: D x D, in which errors are judged.
        least: the channels of a width below which nobody asks for an order: these stay as they stand.
    """
    root, _ = square_root(metric)
    surgeon = Surgeon(root @ weight, moments.covariance_xx, inputs_per_channel=area)
    step = -(-len(surgeon.channels) // ELIMINATION_STEPS)
    gone: list[Tensor] = []
    while (left := len(surgeon.channels)) > least:
        worst = surgeon.scores().argsort(stable=True)[: min(step, left - least)]
        gone.insert(0, surgeon.channels[worst].flip(0))
        surgeon.remove(gone[0])
    return torch.cat((surgeon.channels, *gone))


def refit_channels(
    weight: Tensor, moments: Moments, kept: Tensor, area: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Weight (D x (kept * area)) and constant (D) that give the targets of `moments` best from the kept channels.

    Args:
        weight: D x (C * area) before the fit, which damping holds on to.
        kept: channels, ascending.
    """
    inputs = inputs_of_channels(kept, area)
    return refit(weight[:, inputs], moments.of_channels(inputs), damping)


def one_sided(targets: Tensor, predicted: Tensor) -> Tensor:
    """Targets of the next fit of a layer with a ReLU behind it, given what the fit before gives.

    Where a target is not above 0, any output that is not above 0 is as good. Fits that take turns with this never raise
    the squared error in which such outputs count nothing (majorisation), each damped towards the one before.
    """
    return torch.where(targets > 0, targets, predicted.clamp(max=0))


def damage_of(weight: Tensor, moments: Moments, kept: Tensor, area: int, metric: Tensor, level: float) -> float:
    """What the loss is predicted to rise by with these channels and this weight for them, their constant at its best.

    Args:
        weight: D x (kept * area).
        metric: D x D, see `pruning.calibration.Sensitivity`.
        level: see there too.
    """
    error = error_covariance(weight, moments.of_channels(inputs_of_channels(kept, area)))
    return float((level * (metric * error).sum()).clamp(min=0))  # a NaN stays one


def damage_curve(
    weight: Tensor,
    moments: Moments,
    order: Tensor,
    widths: Sequence[int],
    area: int,
    metric: Tensor,
    level: float,
    judged_on: Moments | None = None,
) -> dict[int, float]:
    """Damage at each of `widths`, the first channels of `order` kept and the convolution refitted.

    Args:
        moments: those of the fits.
        judged_on: moments of other images, since a fit of thousands of unknowns does better on its own than on new
            ones, and the more so the more unknowns; None judges on its own.
    """
    judged_on = moments if judged_on is None else judged_on
    damages = {}
    for width in widths:
        kept = order[:width].sort().values
        fitted, _ = refit_channels(weight, moments, kept, area)
        damages[width] = damage_of(fitted, judged_on, kept, area, metric, level)
    return damages


def new_weights(
    convolution: nn.Conv2d,
    norm: nn.BatchNorm2d | FrozenBatchNorm2d,
    weight: Tensor,
    constant: Tensor,
    kept: Tensor,
    moments: Moments,
) -> tuple[Tensor, Tensor]:
    """A fitted layer over patches as the convolution's weight for kept channels and the batch norm's bias.

    A batch norm that multiplies a channel with nearly nothing cannot give what was fitted: that channel's convolution
    keeps its weight, and gets the best constant.

    Args:
        weight: D x (kept * kh * kw), fitted.
        constant: D, fitted.
        moments: those of the fit.

    Returns:
        D x kept x kh x kw and D, float64 on the CPU.
    """
    area = convolution.kernel_size[0] * convolution.kernel_size[1]
    scale, shift = norm_scale_and_shift(norm)
    old = convolution.weight.detach().double().cpu()[:, kept].flatten(1)
    is_dead = scale.abs() <= LEAST_SCALE * scale.abs().max()
    divided = weight / scale.masked_fill(is_dead, 1.0)[:, None]
    found = torch.where(is_dead[:, None], old, divided)
    of_kept = moments.of_channels(inputs_of_channels(kept, area))
    best = (of_kept.y - scale * (old @ of_kept.x)) / of_kept.weight
    constant = torch.where(is_dead, best, constant)
    # The norm adds its shift, which holds its bias; what stands there besides stays.
    bias = norm.bias.detach().double().cpu() + constant - shift
    if convolution.bias is not None:
        bias = bias - scale * convolution.bias.detach().double().cpu()
    return found.unflatten(1, (len(kept), *convolution.kernel_size)), bias
