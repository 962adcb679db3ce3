"""List the convolutions and matrix products of a detector, for `pruning.cost` to add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from models.detector import Detector
from models.dn_dab_deformable_detr.detector import DnDabDeformableDetr
from models.widths import Widths

# Four neighbours of a sampling point and one attention weight: the factor 5 of Deformable DETR's complexity analysis
# (arXiv 2010.04159, section 4.1).
MACS_PER_SAMPLE = 5


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution, for one image.

    Attributes:
        step: name of the module that computes it, such as `decoder.0.ffn`; a convolution's own name.
        part: what it computes.
        macs: multiply-accumulates.
        is_attention: queries by keys, attention weights by values, or sampling: without weights.
        is_hooked: inside an `nn.Linear` that the original calls as a module.
        is_head: in the detector's heads, after the transformer.
    """

    step: str
    part: str
    macs: int
    is_attention: bool = False
    is_hooked: bool = True
    is_head: bool = False


def convolutions(model: Detector, pixels: Mapping[str, int]) -> list[Product]:
    """Return the convolutions before the transformer; `pixels` are the output pixels of each, by name."""
    weights = dict(model.named_parameters())
    return [
        Product(name, "convolution", count * weights[f"{name}.weight"].numel(), is_hooked=False)
        for name, count in pixels.items()
    ]


def dense_products(model: Detector, widths: Widths, tokens: int) -> list[Product]:
    """Return the products of a dense detector of these widths for `tokens` feature pixels, in network order."""
    queries = model.num_queries * max(1, model.num_patterns)
    return [
        *_dense_encoder(widths, model.hidden_dim, tokens),
        *_dense_decoder(widths, model.hidden_dim, tokens, queries, model.num_classes),
    ]


def deformable_products(model: DnDabDeformableDetr, widths: Widths, tokens: int) -> list[Product]:
    """Return the products of a deformable detector; `tokens` are the feature pixels of all levels."""
    d, queries, products = model.hidden_dim, model.num_queries, []
    for layer, (width, ffn) in enumerate(widths.encoder):
        grid = (model.nheads, model.num_levels, model.points["encoder"])
        products += _deformable_attention(f"encoder.{layer}.attention", d, width, grid, tokens, tokens)
        products.append(Product(f"encoder.{layer}.ffn", "linear1, linear2", 2 * tokens * d * ffn))
    for layer, (self_width, cross_width, ffn) in enumerate(widths.decoder):
        self_step, ffn_step = f"decoder.{layer}.self_attention", f"decoder.{layer}.ffn"
        grid = (model.nheads, model.num_levels, model.points["decoder"])
        has_attention = bool(self_width or cross_width)
        products += [
            Product(self_step, "ref_point_head", queries * 3 * d * d if has_attention else 0),
            Product(self_step, "query_scale", queries * 2 * d * d if has_attention and layer else 0),
            Product(self_step, "in_proj", 3 * queries * d * self_width, is_hooked=False),
            Product(self_step, "attention", 2 * queries**2 * self_width, is_attention=True),
            Product(self_step, "out_proj", queries * self_width * d, is_hooked=False),
            *_deformable_attention(f"decoder.{layer}.cross_attention", d, cross_width, grid, queries, tokens),
            Product(ffn_step, "linear1, linear2", 2 * queries * d * ffn),
            Product(ffn_step, "anchor refinement", queries * (2 * d * d + 4 * d)),
            Product(ffn_step, "class_embed", queries * d * model.num_classes, is_hooked=False, is_head=True),
        ]
    return products


def _deformable_attention(
    step: str, hidden_dim: int, width: int, grid: tuple[int, int, int], queries: int, tokens: int
) -> list[Product]:
    """Return the products of an attention; `grid` is heads, levels, points. Heads share the width equally."""
    if not width:
        return []
    points = math.prod(grid)
    return [
        Product(step, "sampling_offsets", 2 * queries * hidden_dim * points),
        Product(step, "attention_weights", queries * hidden_dim * points),
        Product(step, "value_proj", tokens * hidden_dim * width),
        Product(step, "sampling", MACS_PER_SAMPLE * queries * points * width // grid[0], is_attention=True),
        Product(step, "output_proj", queries * width * hidden_dim),
    ]


def _dense_encoder(widths: Widths, hidden_dim: int, tokens: int) -> list[Product]:
    """Return the products of the encoder for `tokens` feature pixels."""
    products = []
    for layer, (attention, ffn) in enumerate(widths.encoder):
        step = f"encoder.{layer}.attention"
        products += [
            Product(step, "query_scale", 2 * tokens * hidden_dim**2 if attention else 0),
            Product(step, "in_proj", 3 * tokens * hidden_dim * attention, is_hooked=False),
            Product(step, "attention", 2 * tokens**2 * attention, is_attention=True),
            Product(step, "out_proj", tokens * attention * hidden_dim),
            Product(f"encoder.{layer}.ffn", "linear1, linear2", 2 * tokens * hidden_dim * ffn),
        ]
    return products


def _dense_decoder(widths: Widths, hidden_dim: int, tokens: int, queries: int, num_classes: int) -> list[Product]:
    """Return the products of decoder and heads for `queries` queries and `tokens` feature pixels."""
    d, products = hidden_dim, []
    box_head = queries * (2 * d * d + 4 * d)
    for layer, (self_width, cross_width, ffn) in enumerate(widths.decoder):
        self_step, cross_step, ffn_step = (
            f"decoder.{layer}.{block}" for block in ("self_attention", "cross_attention", "ffn")
        )
        query_projections = 3 if layer == 0 else 2
        uses_query_pos = self_width or (layer == 0 and cross_width)
        products += [
            Product(self_step, "ref_point_head", queries * 3 * d * d if uses_query_pos else 0),
            Product(self_step, "query_scale", queries * 2 * d * d if cross_width and layer else 0),
            Product(self_step, "ref_anchor_head", queries * (d * d + 2 * d) if cross_width else 0),
            Product(self_step, "projections", 5 * queries * d * self_width),
            Product(self_step, "attention", 2 * queries**2 * self_width, is_attention=True),
            Product(self_step, "out_proj", queries * self_width * d, is_hooked=False),
            Product(cross_step, "query projections", query_projections * queries * d * cross_width),
            Product(cross_step, "key and value projections", 3 * tokens * d * cross_width),
            Product(cross_step, "attention", 3 * queries * tokens * cross_width, is_attention=True),
            Product(cross_step, "out_proj", queries * cross_width * d, is_hooked=False),
            Product(ffn_step, "linear1, linear2", 2 * queries * d * ffn),
            Product(ffn_step, "anchor refinement", box_head),
            Product(ffn_step, "bbox_embed", box_head, is_head=True),
            Product(ffn_step, "class_embed", queries * d * num_classes, is_hooked=False, is_head=True),
        ]
    return products
