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

from models.residual import ResidualBlock
from pruning.convolution import kernel_area
from pruning.moments import Moments

ROWS_PER_UNKNOWN = 40  # chosen on the demo, see `positions_per_image`
SEED = 0  # of the drawn positions
ROW_BYTES_AT_ONCE = 2**27  # of patches gathered at a time


def positions_per_image(unknowns: int, positions: int, images: int, rows_per_unknown: int = ROWS_PER_UNKNOWN) -> int:
    """Return how many of an image's output positions to draw, so that a fit over `images` has enough rows."""
    return min(positions, -(-rows_per_unknown * unknowns // images))


def block_positions(block: ResidualBlock, number: int, positions: int, image_ids: Sequence[int], images: int) -> Tensor:
    """Draw the output positions for all fits of a residual block's convolution `number`: B x P.

    Args:
        positions: output positions of an image.
        image_ids: of a batch; they decide its positions.
        images: over which a fit is made, in all processes.
    """
    convolutions = block.convolutions()
    layers = [convolutions[number - 1][0]]
    if number == len(convolutions) and block.downsample is not None:
        layers += [layer for layer in block.downsample.children() if isinstance(layer, nn.Conv2d)]
    unknowns = sum(layer.in_channels * kernel_area(layer) for layer in layers)
    return draw_positions(image_ids, positions, positions_per_image(unknowns, positions, images), SEED)


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
    targets: Tensor,
    weights: Tensor,
    positions: Tensor,
    change_targets: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
) -> Moments:
    """Return the weighted sums of a batch over drawn positions.

    Products use the inputs' dtype, see `Moments.of`: with thousands of unknowns they take most of the time.

    Args:
        sources: inputs B x C x H x W of convolutions with equal output sizes; their patches are put side by side.
        targets: B x P x D, target outputs at the positions.
        weights: B x P, not negative.
        positions: B x P, see `draw_positions`.
        change_targets: maps targets B x p x D, their patches B x p x inputs and a slice of the P positions to other
            targets; the moments then have no second moments of the inputs.
    """
    unknowns = sum(inputs.shape[1] * math.prod(convolution.kernel_size) for inputs, convolution in sources)
    at_once = max(1, ROW_BYTES_AT_ONCE // (targets.element_size() * max(1, unknowns) * len(targets)))
    total: Moments | None = None
    for first in range(0, positions.shape[1], at_once):
        part = slice(first, first + at_once)
        x = torch.cat([patches_at(inputs, convolution, positions[:, part]) for inputs, convolution in sources], 2)
        y = targets[:, part]
        if change_targets is not None:
            y = change_targets(y, x, part)
        rows = Moments.of(x, y, weights[:, part], x.dtype, has_xx=change_targets is None)
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total


def _geometry(convolution: nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    assert not isinstance(convolution.padding, str)
    return convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
