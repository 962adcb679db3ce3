"""Sampling of multi-scale deformable attention: in plain PyTorch, or by the compiled operator if it is installed."""

from models.dn_dab_deformable_detr.ops.sampling import (
    sample,
    sample_by_gather,
    sample_in_pytorch,
    without_operator,
)

__all__ = ["sample", "sample_by_gather", "sample_in_pytorch", "without_operator"]
