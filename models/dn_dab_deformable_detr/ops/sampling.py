"""Weighted sums of bilinear samples, in PyTorch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_in_pytorch(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """The sum over levels and points of weight times bilinear sample (arXiv 2010.04159, equation 3, inner sums).

    Args: as of `sample`.
    """
    batch, _, heads, channels = value.shape
    sizes_hw = list(zip(level_sizes[::2], level_sizes[1::2], strict=True))
    dtype = locations.dtype
    grids = 2 * locations - 1
    samples = []
    for level, pixels in enumerate(value.split([height * width for height, width in sizes_hw], dim=1)):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, *sizes_hw[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image.to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)
    summed = (torch.cat(samples, dim=-1) * weights.to(dtype)).sum(-1)
    return summed.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).to(value.dtype)


def sample(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return sample_in_pytorch(value, level_sizes, locations, weights)
