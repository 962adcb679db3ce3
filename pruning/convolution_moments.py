"""Moments of a convolution's input patches at a few output positions of each image, for least-squares fits.

A convolution is a linear layer over patches of C * kh * kw inputs (im2col), so `Moments` and the fits of linear layers
apply. All patches are too many, and neighbours are nearly equal: a few positions of each image are drawn, in total
some tens for each unknown of the fit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.moments import Moments

ROWS_PER_UNKNOWN = 40  # chosen on the demo, see `positions_per_image`
ROW_BYTES_AT_ONCE = 2**27  # of patches in one product: bounds memory and float32 rounding errors


def positions_per_image(unknowns: int, positions: int, images: int, rows_per_unknown: int = ROWS_PER_UNKNOWN) -> int:
    """Return how many of an image's output positions to draw, so that a fit over `images` has enough rows."""
    return min(positions, -(-rows_per_unknown * unknowns // images))


def draw_positions(image_ids: Sequence[int], positions: int, count: int, seed: int) -> Tensor:
    """Draw `count` different output positions of each image: B x count, ascending.

    They depend only on seed and image, not on how images are split into batches and processes.
    """
    drawn = []
    for image_id in image_ids:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{image_id}".encode()))
        drawn.append(torch.randperm(positions, generator=generator)[:count].sort().values)
    return torch.stack(drawn)


def output_size(convolution: nn.Conv2d, size_hw: Sequence[int]) -> tuple[int, int]:
    """Return height and width of a convolution's output for an input of that size."""
    kernel, stride, padding, dilation = _geometry(convolution)
    rows, columns = (
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(size_hw, kernel, stride, padding, dilation, strict=True)
    )
    return rows, columns


def patches_at(inputs: Tensor, convolution: nn.Conv2d, positions: Tensor) -> Tensor:
    """Return the patches that a convolution multiplies with its weight, in the order of its flattened weight.

    Args:
        inputs: B x C x H x W.
        positions: B x P flat output positions.

    Returns:
        B x P x (C * kh * kw).
    """
    kernel, stride, padding, dilation = _geometry(convolution)
    columns = output_size(convolution, inputs.shape[-2:])[1]
    padded = F.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    top, left = positions // columns * stride[0], positions % columns * stride[1]
    down = torch.arange(kernel[0], device=positions.device)[:, None] * dilation[0]
    right = torch.arange(kernel[1], device=positions.device) * dilation[1]
    offsets = (down * padded.shape[-1] + right).flatten()
    flat = (top * padded.shape[-1] + left)[..., None] + offsets  # B x P x (kh * kw)
    channels = inputs.shape[1]
    found = padded.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, channels, -1))
    return found.unflatten(2, flat.shape[1:]).movedim(1, 2).flatten(2)


def outputs_at(outputs: Tensor, positions: Tensor) -> Tensor:
    """Return B x C x h x w `outputs` at B x P flat positions, as B x P x C."""
    flat = outputs.flatten(2)
    return flat.gather(2, positions[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


def moments_at(
    sources: Sequence[tuple[Tensor, nn.Conv2d]],
    outputs: Tensor,
    position_weights: Tensor,
    positions: Tensor,
    change_targets: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Moments:
    """Return the weighted sums of a batch over drawn positions, scaled to estimate those over all positions.

    Products use the inputs' dtype: with thousands of unknowns they take most of the time, and float32 rounding is far
    below the damping. Their sums over portions and batches are float64.

    Args:
        sources: inputs B x C x H x W of convolutions with equal output sizes; their patches are put side by side.
        outputs: B x D x h x w, target outputs.
        position_weights: B x (h * w), not negative.
        positions: B x P, see `draw_positions`.
        change_targets: maps targets B x p x D, their patches B x p x inputs and B x p positions to other targets; the
            moments then have no second moments of the inputs.
    """
    weights = position_weights.gather(1, positions) * (position_weights.shape[1] / positions.shape[1])
    unknowns = sum(inputs.shape[1] * math.prod(convolution.kernel_size) for inputs, convolution in sources)
    at_once = max(1, ROW_BYTES_AT_ONCE // (outputs.element_size() * max(1, unknowns) * len(outputs)))
    total: Moments | None = None
    for part, part_weights in zip(positions.split(at_once, 1), weights.split(at_once, 1), strict=True):
        x = torch.cat([patches_at(inputs, convolution, part) for inputs, convolution in sources], 2)
        y = outputs_at(outputs, part)
        if change_targets is not None:
            y = change_targets(y, x, part)
        rows = Moments.of(x, y, part_weights, x.dtype, has_xx=change_targets is None)
        total = rows if total is None else total + rows
    assert total is not None
    return total


def _geometry(convolution: nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    assert not isinstance(convolution.padding, str)
    return convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
