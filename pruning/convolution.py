"""Refit the convolution after pruned channels, so that a residual block's output changes as little as possible.

The convolution and the batch norm after it are one linear layer over patches. Its weight for the kept channels is
refitted by least squares over the whole receptive field. A block's targets are the unpruned network's activations after
the block minus the pruned network's identity path, so each block also corrects errors of the blocks before it. The
constant goes into the batch norm's bias. Channels are removed in the order of least damage, kh * kw inputs each, and
the others refitted each time. Damage is measured in the metric of the loss's gradients at the batch norm's output, as
for an attention or an FFN, so that one budget covers all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pruning.least_squares import Surgeon, error_covariance, refit
from pruning.moments import DAMPING, Moments, square_root

ELIMINATION_STEPS = 32  # at most, to remove all channels of a convolution
LEAST_SCALE = 1e-3  # relative to the largest scale of a batch norm; channels below it are not refitted


def norm_scale_and_shift(norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in eval mode, frozen or not, as float64 on the CPU."""
    state = {name: tensor.double().cpu() for name, tensor in norm.state_dict().items()}
    weight, bias, mean, variance = (state[name] for name in ("weight", "bias", "running_mean", "running_var"))
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - mean * scale


def as_linear(convolution: nn.Conv2d, norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight D x (C * kh * kw) and bias D of a convolution and its batch norm, as one layer over patches."""
    scale, shift = norm_scale_and_shift(norm)
    weight = scale[:, None] * convolution.weight.detach().double().cpu().flatten(1)
    if convolution.bias is not None:
        shift = shift + scale * convolution.bias.detach().double().cpu()
    return weight, shift


def inputs_of_channels(channels: Tensor, area: int) -> Tensor:
    """Return the inputs of channels, `area` = kh * kw for each."""
    return (channels[:, None] * area + torch.arange(area)).flatten()


def elimination_order(weight: Tensor, moments: Moments, metric: Tensor, area: int, least: int = 0) -> Tensor:
    """Order the input channels of a convolution, most important first, by elimination with refits.

    Args:
        weight: D x (C * area).
        moments: moments of its inputs.
        metric: D x D, metric of output errors.
        least: smallest width needed; the first `least` channels are not ordered by importance.
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
    """Fit weight (D x (kept * area)) and constant (D) for the kept channels to the targets of `moments`.

    Args:
        weight: D x (C * area) before the fit; damping pulls towards it.
        kept: channels, ascending.
    """
    inputs = inputs_of_channels(kept, area)
    return refit(weight[:, inputs], moments.of_channels(inputs), damping)


def one_sided(targets: Tensor, predicted: Tensor) -> Tensor:
    """Return targets for the next fit of a layer followed by a ReLU, given the outputs of the last fit.

    Where a target is not above 0, any output not above 0 is as good. Alternating this with fits, each damped towards
    the last one, never increases the squared error without such outputs (majorisation).
    """
    return torch.where(targets > 0, targets, predicted.clamp(max=0))


def damage_of(weight: Tensor, moments: Moments, kept: Tensor, area: int, metric: Tensor, level: float) -> float:
    """Predict the rise of the loss for the kept channels and their weight, with the best constant.

    Args:
        weight: D x (kept * area).
        metric, level: see `pruning.calibration.Sensitivity`; the metric is D x D.
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
    """Return the damage at each of `widths`, with the first channels of `order` kept and the convolution refitted.

    Args:
        moments: moments for the fits.
        judged_on: moments of other images, since a fit of thousands of unknowns overfits its own, and more so with
        more unknowns; None for `moments`.
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
    """Convert a fitted layer over patches to the convolution's weight for kept channels and the batch norm's bias.

    Where a batch norm scales an output channel to nearly 0, the fit cannot be expressed: the channel keeps its weight
    and gets the best constant.

    Args:
        weight: D x (kept * kh * kw), fitted.
        constant: D, fitted.
        moments: moments of the fit.

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
    # The shift contains the norm's bias; its other terms stay.
    bias = norm.bias.detach().double().cpu() + constant - shift
    if convolution.bias is not None:
        bias = bias - scale * convolution.bias.detach().double().cpu()
    return found.unflatten(1, (len(kept), *convolution.kernel_size)), bias
