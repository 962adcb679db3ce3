"""Sine encodings of pixel positions (Carion et al. 2020) and of anchor boxes (DAB-DETR, arXiv 2201.12329, eq. 4)."""

import math

import torch
from torch import Tensor

from models.layers import at_least_float32


def sine_encoding(position: Tensor, channels: int, temperature: float) -> Tensor:
    """Encode `position` (any shape, in radians) as interleaved sines and cosines along a new last axis of `channels`.

    Returns:
        float64 for positions of that type, else float32.
    """
    position = at_least_float32(position)
    pair = torch.arange(channels, device=position.device) // 2
    frequency = temperature ** (2 * pair.to(position) / channels)
    angle = position.unsqueeze(-1) / frequency
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


def pixel_encoding(
    padding: Tensor,
    hidden_dim: int,
    temperature_h: float,
    temperature_w: float,
    *,
    shift: float = 0.0,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Encode each feature pixel's position among the valid rows and columns.

    Args:
        padding: B x H x W bool, True on padding.
        hidden_dim: channels of the result; the first half encodes y, the second x.
        temperature_h, temperature_w: base of the frequencies for y and for x.
        shift: subtracted from the rows and columns, which count from 1; 0.5 encodes the pixels' centres.
        dtype: type of the features that the encoding is added to.

    Returns:
        B x (H * W) x hidden_dim, float64 for features of that type, else float32.
    """
    valid = ~padding
    dtype = torch.promote_types(dtype, torch.float32)
    rows = valid.cumsum(1, dtype=dtype)
    columns = valid.cumsum(2, dtype=dtype)
    rows = (rows - shift) / (rows[:, -1:, :] + eps) * 2 * math.pi
    columns = (columns - shift) / (columns[:, :, -1:] + eps) * 2 * math.pi
    encodings = (
        sine_encoding(rows, hidden_dim // 2, temperature_h),
        sine_encoding(columns, hidden_dim // 2, temperature_w),
    )
    return torch.cat(encodings, dim=-1).flatten(1, 2)


def anchor_encoding(anchors_cxcywh: Tensor, hidden_dim: int, temperature: float = 10000) -> Tensor:
    """Encode anchors in [0, 1]: ... x 4 (cx, cy, w, h) -> ... x (2 * hidden_dim) in the order y, x, w, h."""
    x, y, width, height = anchors_cxcywh.unbind(-1)  # a list as index would be copied to a GPU, and the CPU would wait
    yxwh = torch.stack((y, x, width, height), dim=-1) * 2 * math.pi
    return sine_encoding(yxwh, hidden_dim // 2, temperature).flatten(-2)
