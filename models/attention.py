"""Multi-head attention, and self-attention with packed input projections."""

import contextlib
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.layers import GatedLayer, gated, output_layer

# The fused CUDA kernels read rows of 16 bytes; PyTorch uses unfused products for other head widths.
CUDA_WIDTH_MULTIPLES = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
# The CPU's fused kernel is faster at multiples of these for 16-bit numbers; for float32 the width does not matter.
CPU_WIDTH_MULTIPLES = {torch.float16: 8, torch.bfloat16: 8}


class PackedProjections(Protocol):
    """A module with the parameters of `add_packed_projections`."""

    in_proj_weight: Tensor
    in_proj_bias: Tensor
    out_proj: nn.Module


def split_heads(x: Tensor, nheads: int) -> Tensor:
    """B x L x (nheads * d) -> B x nheads x L x d."""
    return x.unflatten(-1, (nheads, -1)).transpose(1, 2)


def fused_widths(query_width: int, value_width: int, device_type: str, dtype: torch.dtype) -> tuple[int, int]:
    """Return the head widths (queries and keys, values) to pad to so that PyTorch can use a fused kernel.

    PyTorch's memory-efficient CUDA kernel requires multiples of `CUDA_WIDTH_MULTIPLES`; the two widths may differ. Its
    flash kernel, for 16 bits without a mask, pads internally. On the CPU there is only a flash kernel, 3.7 to 9 times
    as fast as the unfused products; it accepts any width, the same for queries, keys and values. Padding that is
    not required costs more than a better width saves.
    """
    multiple = 1
    if device_type == "cuda":
        multiple = CUDA_WIDTH_MULTIPLES.get(dtype, 1)
    elif device_type == "cpu" and query_width != value_width:
        multiple = CPU_WIDTH_MULTIPLES.get(dtype, 1)
        query_width = value_width = max(query_width, value_width)
    return -(-query_width // multiple) * multiple, -(-value_width // multiple) * multiple


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, widths: tuple[int, int]
) -> Tensor:
    """Compute attention as `attend` does, but do not merge heads, with head widths zero-padded to `widths`.

    The zeros change neither the logits nor the returned channels, B x nheads x Lq x dv.
    """
    query_width, value_width = query.shape[-1], value.shape[-1]
    query, key = (_pad(t, widths[0]) for t in (query, key))
    attended = F.scaled_dot_product_attention(
        query, key, _pad(value, widths[1]), attn_mask=mask, dropout_p=dropout, scale=query_width**-0.5
    )
    return attended[..., :value_width]


def _pad(x: Tensor, width: int) -> Tensor:
    """Pad the last axis with zeros to `width`; return `x` itself if no padding is needed."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Compute scaled dot-product attention (Vaswani et al. 2017, equation 1) and merge the heads.

    Args:
        query: B x nheads x Lq x d.
        key: B x nheads x Lk x d.
        value: B x nheads x Lk x dv.
        mask: bool, broadcastable to B x nheads x Lq x Lk, True where a query may attend; None for everywhere.
        dropout: dropout probability of the attention weights.

    Returns:
        B x Lq x (nheads * dv). The scale is 1 / sqrt(d), where d is the actual head width, pruned or not.
    """
    device_type, widths = query.device.type, (query.shape[-1], value.shape[-1])
    # The backward of PyTorch's fused CPU kernel is slow: a training step takes 13 % longer with it.
    training_on_cpu = device_type == "cpu" and torch.is_grad_enabled()
    # Exported networks are not padded, since other runtimes have other kernels.
    if not (training_on_cpu or torch.compiler.is_exporting()):
        # Under autocast the kernel gets arguments of autocast's type.
        autocast = torch.is_autocast_enabled(device_type)
        widths = fused_widths(*widths, device_type, torch.get_autocast_dtype(device_type) if autocast else query.dtype)
    with sdpa_kernel(SDPBackend.MATH) if training_on_cpu else contextlib.nullcontext():
        attended = padded_attention(query, key, value, mask, dropout, widths)
    return attended.transpose(1, 2).flatten(2)


def add_packed_projections(holder: nn.Module, hidden_dim: int, width: int) -> PackedProjections:
    """Add in_proj_weight and in_proj_bias (3 * width: queries, keys, values) and out_proj to `holder`; return it.

    For width 0, add only the bias of out_proj.
    """
    if width:
        holder.in_proj_weight = nn.Parameter(torch.empty(3 * width, hidden_dim))
        holder.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
    holder.out_proj = output_layer(width, hidden_dim)
    return cast(PackedProjections, holder)


def packed_self_attention(
    layer: GatedLayer, block: str, holder: PackedProjections, x: Tensor, pos: Tensor, mask: Tensor | None
) -> Tensor:
    """Compute the self-attention of one block of a layer, with queries and keys from x + pos and values from x.

    Args:
        layer: provides `nheads`, the block's gates and the observer of its activations.
        block: name of the block.
        holder: has the parameters of `add_packed_projections`.
        x, pos: B x L x hidden_dim.
        mask: as in `attend`.

    Returns:
        B x L x width, the input of out_proj.
    """
    weight, bias = holder.in_proj_weight, holder.in_proj_bias
    width = weight.shape[0] // 3
    query_gate, value_gate = layer.gate(block)
    query_and_key = F.linear(x + pos, weight[: 2 * width], bias[: 2 * width])
    query, key = query_and_key[..., :width], query_and_key[..., width:]  # exporters fold slices, unlike chunks
    value = F.linear(x, weight[2 * width :], bias[2 * width :])
    layer.observe(block, queries=(query,), keys=(key,), key_mask=mask)
    gated_inputs = (gated(query, query_gate), key, gated(value, value_gate))
    query, key, value = (split_heads(t, layer.nheads) for t in gated_inputs)
    attended = attend(query, key, value, mask, layer.attention_dropout)
    layer.observe(block, attended=attended)
    return attended
