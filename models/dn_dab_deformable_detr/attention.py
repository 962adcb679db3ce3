"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.dn_dab_deformable_detr.ops import sample
from models.layers import OnlyBias, at_least_float32, gated, numbers_on, output_layer
from models.prunable import ParameterSlice, columns, rows_and_bias

SAMPLING_PARAMETERS = tuple(f"{name}.{leaf}" for name in ("sampling_offsets", "attention_weights")
                            for leaf in ("weight", "bias"))  # fmt: skip


class DeformableAttention(nn.Module):
    """Each query samples each feature level at a few learned points (equation 3 of the paper).

    Args:
        hidden_dim: channels of queries, features and result.
        width: value channels; 0 keeps only the bias of the output projection.
        nheads: number of attention heads.
        num_levels: number of feature levels.
        num_points: number of points that a head samples on each level.
    """

    def __init__(self, hidden_dim: int, width: int, nheads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.grid = (nheads, num_levels, num_points)
        if width:
            self.sampling_offsets = nn.Linear(hidden_dim, math.prod(self.grid) * 2)
            self.attention_weights = nn.Linear(hidden_dim, math.prod(self.grid))
            self.value_proj = nn.Linear(hidden_dim, width)
        self.output_proj = output_layer(width, hidden_dim)

    @property
    def is_removed(self) -> bool:
        """Whether only the bias of the output projection is left."""
        return isinstance(self.output_proj, OnlyBias)

    @torch.no_grad()
    def initialise_sampling(self) -> None:
        """Set equal weights, and offsets on square rings: a direction for each head, k + 1 pixels for point k."""
        if self.is_removed:
            return
        nheads, num_levels, num_points = self.grid
        angle = torch.arange(nheads) * (2 * math.pi / nheads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, num_points + 1)
        ring = direction[:, None, None] * steps[:, None]
        self.sampling_offsets.bias.copy_(ring.expand(-1, num_levels, -1, -1).flatten())
        for parameter in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        sizes_flat: list[int],
        gate: Tensor | None,
    ) -> Tensor:
        """Compute attention without the output projection, which the layer applies so that an observer gets its input.

        Args:
            query: B x Q x hidden_dim.
            reference: points B x Q x L x 2 (x, y) or boxes B x Q x L x 4 (cxcywh), in [0, 1] of each level's map; B
                may be 1.
            memory: B x S x hidden_dim, the features of all levels.
            memory_mask: B x S x 1 bool, True on image pixels; None without padding.
            sizes_flat: [h0, w0, h1, w1, ...] of the levels.
            gate: gate of the value channels, `width` or B x 1 x width, or None.

        Returns:
            B x Q x width, the input of `output_proj`.
        """
        nheads = self.grid[0]
        value = gated(self.value_proj(memory), gate)
        if memory_mask is not None:
            value = value.masked_fill(~memory_mask, 0)
        weights = at_least_float32(self.attention_weights(query)).unflatten(-1, (nheads, -1)).softmax(-1)
        sampled = sample(
            value.unflatten(-1, (nheads, -1)),
            sizes_flat,
            self._locations(query, reference, sizes_flat),
            weights.unflatten(-1, self.grid[1:]),
        )
        return sampled.flatten(2)

    def _locations(self, query: Tensor, reference: Tensor, sizes_flat: list[int]) -> Tensor:
        """Return the sampling points B x Q x heads x levels x points x 2 (x, y), in [0, 1] of each level's map.

        They are float32 or wider, because 16 bits are too few for the pixels of a large map.
        """
        offsets = at_least_float32(self.sampling_offsets(query)).unflatten(-1, (*self.grid, 2))
        reference = reference[:, :, None, :, None].to(offsets.dtype)
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets / self.grid[2] * reference[..., 2:] * 0.5
        sizes_wh = numbers_on(offsets.device, sizes_flat, offsets.dtype).unflatten(0, (-1, 2)).flip(-1)
        return reference + offsets / sizes_wh[:, None]


def deformable_attention_slices(prefix: str) -> tuple[ParameterSlice, ...]:
    """Return the parameter slices of the deformable attention at `prefix` that shrink with its value channels."""
    return (*rows_and_bias(f"{prefix}.value_proj", "value"), columns(f"{prefix}.output_proj", "value"))
