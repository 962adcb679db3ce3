"""Weights of an attention's queries, keys and values whose kept channels hold projections of all channels of a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from models.prunable import PrunableModule

QUERY_PARTS = {"query": 0, "position_query": 1}
KEY_PARTS = {"key": 0, "position_key": 1, "common_key": 0}


def logit_blocks(module: PrunableModule, weights: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the side (0 for queries, 1 for keys), the product's index, and a view of the rows of a weight or bias."""
    for piece in module.parameter_slices():
        if piece.axis:
            continue
        for part, block in piece.blocks(weights[piece.key]):
            for side, products in enumerate((QUERY_PARTS, KEY_PARTS)):
                if part in products:
                    yield side, products[part], block


def project_rows(block: Tensor, kept: Tensor, projections: Tensor) -> None:
    """Set rows[kept of head h] = projections[h] @ rows[all of head h] in a weight (width x D) or bias (width)."""
    heads, _, head_width = projections.shape
    rows = block.detach().double().cpu().reshape(heads, head_width, -1)
    block[kept.to(block.device)] = (projections @ rows).flatten(0, 1).reshape(-1, *block.shape[1:]).to(block)


def balance(projections: Sequence[Sequence[Tensor]], blocks: list[tuple[int, int, Tensor]]) -> None:
    """Rescale each direction so that its query and key weights have equal norms; the logits do not change.

    If one side's weights are a hundred times larger, the first steps of fine-tuning destroy more than they repair.
    """
    for product, (on_queries, on_keys) in enumerate(zip(*projections, strict=True)):
        squares = []
        for side, projection in enumerate((on_queries, on_keys)):
            heads, _, head_width = projection.shape
            rows = [b.detach().double().cpu().reshape(heads, head_width, -1) for s, p, b in blocks
                    if (s, p) == (side, product) and b.dim() == 2]  # fmt: skip
            squares.append(sum((projection @ weight).square().sum(-1, keepdim=True) for weight in rows))
        ratio = (squares[1].clamp(min=1e-30) / squares[0].clamp(min=1e-30)) ** 0.25
        on_queries.mul_(ratio)
        on_keys.div_(ratio)
