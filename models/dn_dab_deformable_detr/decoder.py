"""Decoder of DAB-Deformable-DETR (arXiv 2201.12329, 2010.04159): queries are anchor boxes that each layer refines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.attention import add_packed_projections, packed_self_attention
from models.dn_dab_deformable_detr.attention import (
    SAMPLING_PARAMETERS,
    DeformableAttention,
    deformable_attention_slices,
)
from models.dn_dab_deformable_detr.state import DeformableState
from models.layers import MLP, GatedLayer, inverse_sigmoid, module_list
from models.position_encoding import anchor_encoding
from models.prunable import ParameterSlice, ffn_slices, packed_attention_slices


class DecoderLayer(GatedLayer):
    """Self-attention among queries, deformable cross-attention to the image, FFN; each with residual and norm.

    Args:
        hidden_dim: channels of the queries.
        widths: channels of the self-attention, value channels of the cross-attention and channels of the FFN.
        nheads: number of attention heads.
        num_levels, num_points: number of feature levels, and of points sampled on each.
        dropout: dropout probability.
    """

    def __init__(
        self, hidden_dim: int, widths: tuple[int, ...], nheads: int, num_levels: int, num_points: int, dropout: float
    ) -> None:
        self_width, cross_width, ffn_width = widths
        super().__init__(hidden_dim, ffn_width, "relu", dropout)
        self.nheads = nheads
        self.cross_attn = DeformableAttention(hidden_dim, cross_width, nheads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.self_attn = add_packed_projections(nn.Module(), hidden_dim, self_width)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def last_layer(self, block: str) -> nn.Module:
        """Return the layer after the channels of `self_attention`, `cross_attention` or `ffn`."""
        layers = {"self_attention": self.self_attn.out_proj, "cross_attention": self.cross_attn.output_proj}
        return layers.get(block, self.linear2)

    def self_attention(self, x: Tensor, state: DeformableState) -> Tensor:
        """Return the queries after self-attention; x is B x Q x hidden_dim."""
        attended = x
        if not self.is_removed("self_attention"):
            assert state.query_pos is not None
            attended = packed_self_attention(
                self, "self_attention", self.self_attn, x, state.query_pos, state.query_mask
            )
        return self.norm2(x + self.dropout(self.self_attn.out_proj(attended)))

    def cross_attention(self, x: Tensor, state: DeformableState) -> Tensor:
        """Return the queries after cross-attention (B x Q x hidden_dim); anchors are scaled to each padded map."""
        attended = x
        if not self.is_removed("cross_attention"):
            gate, _ = self.gate("cross_attention")
            reference = state.anchors[:, :, None] * state.valid_ratios.repeat(1, 1, 2)[:, None]
            assert state.query_pos is not None  # set by the layer's self-attention
            query = x + state.query_pos
            attended = self.cross_attn(query, reference, state.memory, state.memory_mask, state.levels.flat(), gate)
            self.observe("cross_attention", attended=attended)
        return self.norm1(x + self.dropout(self.cross_attn.output_proj(attended)))

    def other_parameters(self, block: str) -> list[str]:
        """Return the names, in the layer, of a block's parameters that do not shrink with its width."""
        if block == "cross_attention":
            return [f"cross_attn.{name}" for name in SAMPLING_PARAMETERS]
        return super().other_parameters(block)

    def slices(self, prefix: str) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices that shrink with the block; `prefix` is the layer's key."""
        return {
            "self_attention": packed_attention_slices(f"{prefix}.self_attn"),
            "cross_attention": deformable_attention_slices(f"{prefix}.cross_attn"),
            "ffn": ffn_slices(prefix),
        }


class Decoder(nn.Module):
    """A stack of decoder layers that refine anchors.

    Args:
        layers: the layers in order.
        hidden_dim: channels of the queries.
        bbox_embed: the detector's box heads, one for each layer.
        anchor_eps: `eps` of `inverse_sigmoid`.
        anchors_on_padded_map: encode anchors relative to the finest map with its padding, as the reference does, not
            relative to the image.
    """

    def __init__(
        self,
        layers: list[DecoderLayer],
        hidden_dim: int,
        bbox_embed: Sequence[MLP],
        anchor_eps: float,
        anchors_on_padded_map: bool,
    ) -> None:
        super().__init__()
        self.anchors_on_padded_map = anchors_on_padded_map
        self.anchor_eps = anchor_eps
        self.layers = module_list(layers)
        self.query_scale = MLP(hidden_dim, hidden_dim, hidden_dim)
        self.ref_point_head = MLP(2 * hidden_dim, hidden_dim, hidden_dim)
        self.bbox_embed = bbox_embed

    def step(self, index: int, block: str, state: DeformableState) -> DeformableState:
        """Run one block (`self_attention`, `cross_attention` or `ffn`) of one layer."""
        layer, x = self.layers[index], state.queries
        if block == "self_attention":
            return self.self_attention(index, self.position_queries(index, state))
        if block == "cross_attention":
            return state.replace(queries=layer.cross_attention(x, state))
        return self._finish_layer(index, state.replace(queries=layer.ffn(x)))

    def self_attention(self, index: int, state: DeformableState) -> DeformableState:
        """Run the self-attention of a layer whose queries have their positions."""
        return state.replace(queries=self.layers[index].self_attention(state.queries, state))

    def position_queries(self, index: int, state: DeformableState) -> DeformableState:
        """Compute positional queries from the anchors, scaled by the content except in the first layer.

        Those that only removed attentions would use are not computed.
        """
        layer, x, anchors = self.layers[index], state.queries, state.anchors
        if layer.is_removed("self_attention") and layer.is_removed("cross_attention"):
            return state
        if self.anchors_on_padded_map:
            anchors = anchors * state.valid_ratios[:, :1].repeat(1, 1, 2)
        query_pos = self.ref_point_head(anchor_encoding(anchors, x.shape[-1]))
        return state.replace(query_pos=query_pos if index == 0 else query_pos * self.query_scale(x))

    def _finish_layer(self, index: int, state: DeformableState) -> DeformableState:
        """Predict the layer's boxes, which without gradient are the anchors of the next layer."""
        x = state.queries
        boxes = (self.bbox_embed[index](x) + inverse_sigmoid(state.anchors, self.anchor_eps)).sigmoid()
        state = state.replace(hidden=(*state.hidden, x), boxes=(*state.boxes, boxes))
        return state if index == len(self.layers) - 1 else state.replace(anchors=boxes.detach())
