"""Encoder of Deformable DETR (arXiv 2010.04159): post-norm layers over the pixels of all levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.dn_dab_deformable_detr.attention import (
    SAMPLING_PARAMETERS,
    DeformableAttention,
    deformable_attention_slices,
)
from models.dn_dab_deformable_detr.state import DeformableState, LevelSizes
from models.layers import GatedLayer, module_list, numbers_on
from models.prunable import ParameterSlice, ffn_slices


class EncoderLayer(GatedLayer):
    """Deformable self-attention (queries from x + pos, values from x), then the FFN, each with residual and norm.

    Args:
        hidden_dim: channels of x.
        widths: value channels of the attention and channels of the FFN.
        nheads: number of attention heads.
        num_levels, num_points: number of feature levels, and of points sampled on each.
        dropout: dropout probability.
    """

    def __init__(
        self, hidden_dim: int, widths: tuple[int, ...], nheads: int, num_levels: int, num_points: int, dropout: float
    ) -> None:
        width, ffn_width = widths
        super().__init__(hidden_dim, ffn_width, "relu", dropout)
        self.self_attn = DeformableAttention(hidden_dim, width, nheads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def last_layer(self, block: str) -> nn.Module:
        """Return the layer after the channels of `attention` or `ffn`."""
        return self.linear2 if block == "ffn" else self.self_attn.output_proj

    def attention(self, reference: Tensor | None, state: DeformableState) -> Tensor:
        """Return the memory after attention, B x S x hidden_dim.

        Args:
            reference: B x S x L x 2; None if the attention is removed.
            state: the input.
        """
        x = attended = state.memory
        if reference is not None:
            gate, _ = self.gate("attention")
            attended = self.self_attn(x + state.memory_pos, reference, x, state.memory_mask, state.levels.flat(), gate)
            self.observe("attention", attended=attended)
        return self.norm1(x + self.dropout(self.self_attn.output_proj(attended)))

    def other_parameters(self, block: str) -> list[str]:
        """Return the names, in the layer, of a block's parameters that do not shrink with its width."""
        if block == "attention":
            return [f"self_attn.{name}" for name in SAMPLING_PARAMETERS]
        return super().other_parameters(block)

    def slices(self, prefix: str) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices that shrink with the block; `prefix` is the layer's key."""
        return {"attention": deformable_attention_slices(f"{prefix}.self_attn"), "ffn": ffn_slices(prefix)}


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = module_list(layers)

    def step(self, index: int, block: str, state: DeformableState) -> DeformableState:
        """Run one block (`attention` or `ffn`) of one layer."""
        layer = self.layers[index]
        if block == "attention":
            reference = None if layer.is_removed(block) else reference_points(state.levels, state.valid_ratios)
            return state.replace(memory=layer.attention(reference, state))
        return state.replace(memory=layer.ffn(state.memory))


def reference_points(levels: LevelSizes, valid_ratios: Tensor) -> Tensor:
    """Return the position of each feature pixel's centre on the map of every level.

    Args:
        levels: L sizes with S pixels in all.
        valid_ratios: B x L x 2, width and height.

    Returns:
        B x S x L x 2 (x, y): the centre relative to the image without padding, times each level's valid ratio.
    """
    points = []
    for index, (height, width) in enumerate(levels.sizes_hw):
        y = torch.arange(height, device=valid_ratios.device) + 0.5
        x = torch.arange(width, device=valid_ratios.device) + 0.5
        centres = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1).flatten(0, 1)
        size_wh = numbers_on(valid_ratios.device, (width, height))
        points.append(centres / (valid_ratios[:, index, None] * size_wh))
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]
