"""Sampling of multi-scale deformable attention: the pure PyTorch form, and the compiled operator where it is built."""

from models.dn_dab_deformable_detr.ops.sampling import sample, sample_in_pytorch, without_operator

__all__ = ["sample", "sample_in_pytorch", "without_operator"]
