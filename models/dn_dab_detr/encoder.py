"""Transformer encoder of DAB-DETR: post-norm layers whose position encodings are scaled by the content."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from models.attention import PackedProjections, add_packed_projections, packed_self_attention
from models.layers import MLP, GatedLayer, module_list
from models.prunable import ParameterSlice, ffn_slices, packed_attention_slices
from models.state import DetectorState


class EncoderLayer(GatedLayer):
    """Self-attention (queries and keys from x + pos, values from x), then the FFN, each with residual and norm.

    Args:
        hidden_dim: channels of x.
        widths: channels of the attention and of the FFN.
        nheads: number of attention heads.
        activation: key of `models.layers.ACTIVATIONS`.
        dropout: dropout probability.
        slim_names: name the attention's parameters `in_proj_weight` and so on, as in the paper's slim models, instead
            of `self_attn.in_proj_weight` as in DN-DETR's release.
    """

    def __init__(
        self,
        hidden_dim: int,
        widths: tuple[int, ...],
        nheads: int,
        activation: str,
        dropout: float,
        slim_names: bool,
    ) -> None:
        width, ffn_width = widths
        super().__init__(hidden_dim, ffn_width, activation, dropout)
        self.nheads = nheads
        holder: nn.Module = self
        if not slim_names:
            self.self_attn = holder = nn.Module()
        add_packed_projections(holder, hidden_dim, width)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    @property
    def projections(self) -> PackedProjections:
        """The module that holds in_proj_weight (3 * width x hidden_dim: queries, keys, values) and out_proj."""
        return cast(PackedProjections, self._modules.get("self_attn", self))

    def last_layer(self, block: str) -> nn.Module:
        """Return the layer after the channels of `attention` or `ffn`."""
        return self.linear2 if block == "ffn" else self.projections.out_proj

    def attention(self, x: Tensor, pos: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return x after self-attention.

        Args:
            x, pos: B x S x hidden_dim; pos None if the attention is removed.
            mask: as in `models.attention.attend`.
        """
        attended = x if pos is None else packed_self_attention(self, "attention", self.projections, x, pos, mask)
        return self.norm1(x + self.dropout(self.projections.out_proj(attended)))

    def slices(self, prefix: str) -> dict[str, tuple[ParameterSlice, ...]]:
        """Return, by block, the parameter slices that shrink with the block; `prefix` is the layer's key."""
        holder = prefix if self.projections is self else f"{prefix}.self_attn"
        return {"attention": packed_attention_slices(holder), "ffn": ffn_slices(prefix)}


class Encoder(nn.Module):
    """A stack of encoder layers; each adds `pos * query_scale(x)` to its queries and keys."""

    def __init__(self, layers: list[EncoderLayer], hidden_dim: int) -> None:
        super().__init__()
        self.layers = module_list(layers)
        self.query_scale = MLP(hidden_dim, hidden_dim, hidden_dim)

    def step(self, index: int, block: str, state: DetectorState) -> DetectorState:
        """Run one block (`attention` or `ffn`) of one layer."""
        layer, x = self.layers[index], state.memory
        if block == "attention":
            pos = None if layer.is_removed(block) else state.memory_pos * self.query_scale(x)
            return state.replace(memory=layer.attention(x, pos, state.memory_mask))
        return state.replace(memory=layer.ffn(x))
