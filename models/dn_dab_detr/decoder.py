"""Transformer decoder of DAB-DETR (arXiv 2201.12329): queries are anchor boxes that each layer refines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.attention import attend, split_heads
from models.layers import MLP, GatedLayer, OutputProjection, gated, inverse_sigmoid, module_list
from models.position_encoding import anchor_encoding
from models.prunable import ParameterSlice, columns, ffn_slices, rows_and_bias
from models.state import DetectorState


class DecoderLayer(GatedLayer):
    """Self-attention among queries, cross-attention to the image, FFN; each with residual and norm.

    Args:
        hidden_dim: channels of the queries.
        widths: channels of the self-attention, the cross-attention and the FFN.
        nheads: number of attention heads.
        activation: key of `models.layers.ACTIVATIONS`.
        dropout: dropout probability.
        is_first: also add the positional query and key to the content in the cross-attention.
    """

    def __init__(
        self, hidden_dim: int, widths: tuple[int, ...], nheads: int, activation: str, dropout: float, is_first: bool
    ) -> None:
        self_width, cross_width, ffn_width = widths
        super().__init__(hidden_dim, ffn_width, activation, dropout)
        self.nheads = nheads
        self.is_first = is_first
        if self_width:
            self.sa_qcontent_proj = nn.Linear(hidden_dim, self_width)
            self.sa_qpos_proj = nn.Linear(hidden_dim, self_width)
            self.sa_kcontent_proj = nn.Linear(hidden_dim, self_width)
            self.sa_kpos_proj = nn.Linear(hidden_dim, self_width)
            self.sa_v_proj = nn.Linear(hidden_dim, self_width)
        self.self_attn = OutputProjection(self_width, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)

        if cross_width:
            self.ca_qcontent_proj = nn.Linear(hidden_dim, cross_width)
            if is_first:
                self.ca_qpos_proj = nn.Linear(hidden_dim, cross_width)
            self.ca_kcontent_proj = nn.Linear(hidden_dim, cross_width)
            self.ca_kpos_proj = nn.Linear(hidden_dim, cross_width)
            self.ca_v_proj = nn.Linear(hidden_dim, cross_width)
            self.ca_qpos_sine_proj = nn.Linear(hidden_dim, cross_width)
        self.cross_attn = OutputProjection(cross_width, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def last_layer(self, block: str) -> nn.Module:
        """Return the layer after the channels of `self_attention`, `cross_attention` or `ffn`."""
        layers = {"self_attention": self.self_attn.out_proj, "cross_attention": self.cross_attn.out_proj}
        return layers.get(block, self.linear2)

    @property
    def uses_query_pos(self) -> bool:
        """Whether an attention adds the positional queries."""
        return not (self.is_removed("self_attention") and (self.is_removed("cross_attention") or not self.is_first))

    def self_attention(self, x: Tensor, state: DetectorState) -> Tensor:
        """Return the queries after self-attention; x is B x Q x hidden_dim."""
        attended = x if self.is_removed("self_attention") else self._attend_to_queries(x, state)
        return self.norm1(x + self.dropout(self.self_attn(attended)))

    def _attend_to_queries(self, x: Tensor, state: DetectorState) -> Tensor:
        """Return the input of self-attention's output projection, B x Q x width."""
        query_pos = state.query_pos
        query_gate, value_gate = self.gate("self_attention")
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        value = gated(self.sa_v_proj(x), value_gate)
        self.observe("self_attention", queries=(query,), keys=(key,), key_mask=None)
        query, key, value = (split_heads(t, self.nheads) for t in (gated(query, query_gate), key, value))
        attended = attend(query, key, value, state.query_mask, self.attention_dropout)
        self.observe("self_attention", attended=attended)
        return attended

    def cross_attention(self, x: Tensor, state: DetectorState) -> Tensor:
        """Return the queries after cross-attention (B x Q x hidden_dim); heads concatenate content and position."""
        attended = x if self.is_removed("cross_attention") else self._attend_to_memory(x, state)
        return self.norm2(x + self.dropout(self.cross_attn(attended)))

    def _attend_to_memory(self, x: Tensor, state: DetectorState) -> Tensor:
        """Return the input of cross-attention's output projection, B x Q x width."""
        query_gate, value_gate = self.gate("cross_attention")
        query, key = self.ca_qcontent_proj(x), self.ca_kcontent_proj(state.memory)
        key_pos = self.ca_kpos_proj(state.memory_pos)
        if self.is_first:
            query = query + self.ca_qpos_proj(state.query_pos)
            key = key + key_pos
        query_sine = self.ca_qpos_sine_proj(state.query_sine)
        value = gated(self.ca_v_proj(state.memory), value_gate)
        self.observe("cross_attention", queries=(query, query_sine), keys=(key, key_pos), key_mask=state.memory_mask)
        attended = attend(
            self._concatenate(gated(query, query_gate), gated(query_sine, query_gate)),
            self._concatenate(key, key_pos),
            split_heads(value, self.nheads),
            state.memory_mask,
            self.attention_dropout,
        )
        self.observe("cross_attention", attended=attended)
        return attended

    def _concatenate(self, content: Tensor, position: Tensor) -> Tensor:
        """Concatenate two B x L x width to B x nheads x L x (2 * head width); position may have B = 1."""
        content, position = split_heads(content, self.nheads), split_heads(position, self.nheads)
        return torch.cat((content, position.expand(content.shape)), dim=-1)

    def slices(self, prefix: str) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices that shrink with the block; `prefix` is the layer's key."""
        self_slices, cross_slices = [], []
        for name in ("sa_qcontent_proj", "sa_qpos_proj"):
            self_slices += rows_and_bias(f"{prefix}.{name}", "query", fold=True)
        for name in ("sa_kcontent_proj", "sa_kpos_proj"):
            self_slices += rows_and_bias(f"{prefix}.{name}", "key")
        self_slices += [
            *rows_and_bias(f"{prefix}.sa_v_proj", "value"),
            columns(f"{prefix}.self_attn.out_proj", "value"),
        ]

        content_queries = ("ca_qcontent_proj", *(("ca_qpos_proj",) if self.is_first else ()))
        for name in content_queries:
            cross_slices += rows_and_bias(f"{prefix}.{name}", "query", fold=True)
        cross_slices += rows_and_bias(f"{prefix}.ca_qpos_sine_proj", "position_query", fold=True)
        cross_slices += rows_and_bias(f"{prefix}.ca_kcontent_proj", "key")
        cross_slices += rows_and_bias(f"{prefix}.ca_kpos_proj", "common_key" if self.is_first else "position_key")
        cross_slices += [
            *rows_and_bias(f"{prefix}.ca_v_proj", "value"),
            columns(f"{prefix}.cross_attn.out_proj", "value"),
        ]
        return {
            "self_attention": tuple(self_slices),
            "cross_attention": tuple(cross_slices),
            "ffn": ffn_slices(prefix),
        }


class Decoder(nn.Module):
    """A stack of decoder layers that refine anchors.

    Args:
        layers: the layers in order.
        hidden_dim: channels of the queries.
        bbox_embed: the detector's box head, which also refines the anchors.
        anchor_eps: `eps` of `inverse_sigmoid`.
    """

    def __init__(self, layers: list[DecoderLayer], hidden_dim: int, bbox_embed: MLP, anchor_eps: float) -> None:
        super().__init__()
        self.anchor_eps = anchor_eps
        self.layers = module_list(layers)
        self.norm = nn.LayerNorm(hidden_dim)
        self.query_scale = MLP(hidden_dim, hidden_dim, hidden_dim)
        self.ref_point_head = MLP(2 * hidden_dim, hidden_dim, hidden_dim)
        self.ref_anchor_head = MLP(hidden_dim, hidden_dim, 2)
        self.bbox_embed = bbox_embed

    def step(self, index: int, block: str, state: DetectorState) -> DetectorState:
        """Run one block (`self_attention`, `cross_attention` or `ffn`) of one layer."""
        layer, x = self.layers[index], state.queries
        if block == "self_attention":
            return self.self_attention(index, self.position_queries(index, state))
        if block == "cross_attention":
            return state.replace(queries=layer.cross_attention(x, state))
        return self._finish_layer(index, state.replace(queries=layer.ffn(x)))

    def self_attention(self, index: int, state: DetectorState) -> DetectorState:
        """Run the self-attention of a layer whose queries have their positions."""
        return state.replace(queries=self.layers[index].self_attention(state.queries, state))

    def position_queries(self, index: int, state: DetectorState) -> DetectorState:
        """Compute positional queries from anchors, modulated by their sizes (arXiv 2201.12329, equations 5 and 6).

        Those that only removed attentions would use are not computed.
        """
        layer, x, anchors = self.layers[index], state.queries, state.anchors
        hidden_dim = x.shape[-1]
        has_cross_attention = not layer.is_removed("cross_attention")
        if not (layer.uses_query_pos or has_cross_attention):
            return state
        encoding = anchor_encoding(anchors, hidden_dim)
        if layer.uses_query_pos:
            state = state.replace(query_pos=self.ref_point_head(encoding))
        if not has_cross_attention:
            return state
        query_sine = encoding[..., :hidden_dim]
        if index > 0:
            query_sine = query_sine * self.query_scale(x)
        reference_wh = self.ref_anchor_head(x).sigmoid()
        ratio_hw = (reference_wh / anchors[..., 2:]).flip(-1)
        modulated = query_sine.unflatten(-1, (2, -1)) * ratio_hw.unsqueeze(-1)
        return state.replace(query_sine=modulated.flatten(-2))

    def _finish_layer(self, index: int, state: DetectorState) -> DetectorState:
        """Predict the layer's boxes and refine the anchors for the next layer."""
        x = state.queries
        hidden = self.norm(x)
        boxes = (self.bbox_embed(hidden) + inverse_sigmoid(state.live_anchors, self.anchor_eps)).sigmoid()
        state = state.replace(hidden=(*state.hidden, hidden), boxes=(*state.boxes, boxes))
        if index == len(self.layers) - 1:
            return state
        refined = (self.bbox_embed(x) + inverse_sigmoid(state.anchors, self.anchor_eps)).sigmoid()
        return state.replace(anchors=refined.detach(), live_anchors=refined)
