"""Building blocks of the encoder, the decoder and the heads."""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Called with the name of a block and some of its activations.
Observer = Callable[[str, dict[str, Any]], None]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# DN-DETR's bound of the coordinates of anchors and noised boxes before it computes their logits.
ANCHOR_EPS = 1e-3
PACKED = ("in_proj_weight", "in_proj_bias")  # parameters of linear layers whose projections are packed
ACTIVATIONS: dict[str, type[nn.Module]] = {"prelu": nn.PReLU, "relu": nn.ReLU}


def module_list(modules: Iterable[ModuleT]) -> Sequence[ModuleT]:
    """Return an `nn.ModuleList` typed as a sequence of its modules' type."""
    return cast(Sequence[ModuleT], nn.ModuleList(modules))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert 16-bit tensors to float32; float32 and float64 are unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def numbers_on(device: torch.device, numbers: Sequence, dtype: torch.dtype | None = None) -> Tensor:
    """Return `torch.tensor(numbers)` on a device, for which a GPU's queue need not be empty."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


class MLP(nn.Module):
    """Linear layers with ReLU between them; `dims` lists the input, hidden and output channels."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = module_list(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """... x input channels -> ... x output channels."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class OnlyBias(nn.Module):
    """What remains of the last layer of a branch whose width is 0: its bias.

    Args:
        channels: of the branch's output.
        is_buffer: keep the bias as a buffer, like a frozen batch norm, not as a parameter.
    """

    bias: Tensor

    def __init__(self, channels: int, is_buffer: bool = False) -> None:
        super().__init__()
        if is_buffer:
            self.register_buffer("bias", torch.zeros(channels))
        else:
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the bias, in training as often as x (... x channels) has tokens, so that dropout treats each apart."""
        return self.bias.expand_as(x) if self.training else self.bias


def output_layer(width: int, hidden_dim: int) -> nn.Module:
    """Return the linear layer after `width` channels, or only its bias for width 0."""
    return nn.Linear(width, hidden_dim) if width else OnlyBias(hidden_dim)


class OutputProjection(nn.Module):
    """Output projection of an attention; a separate module gives it its name in the state dict."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.out_proj = output_layer(width, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """B x L x width -> B x L x hidden_dim."""
        projected: Tensor = self.out_proj(x)
        return projected


class GatedModule(nn.Module):
    """Base class of everything that has channels to prune, with gates and an observer.

    A gate multiplies exactly the channels that pruning would remove, so that the gated module and the pruned module
    compute the same function. It has the shape `width`, or `B x 1 x width` for a gate per image. `gates[block]` are the
    gates of a block; the second is None if the block has one. Gates are not in the state dict.

    `observer`, if set, is called with a block's name and its activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.observer: Observer | None = None

    def gate(self, block: str) -> tuple[Tensor | None, Tensor | None]:
        """Return the gates of a block, `(None, None)` if it has none."""
        return self.gates.get(block, (None, None))

    def observe(self, block: str, **activations: Tensor | tuple[Tensor, ...] | None) -> None:
        """Pass activations of a block to the observer."""
        if self.observer is not None:
            self.observer(block, activations)


class GatedLayer(GatedModule):
    """Base class of the transformer layers, with the feed-forward block.

    `gates[block]` is `(query gate, value gate)` for an attention, `(value gate, None)` for a deformable attention and
    `(hidden gate, None)` for the FFN.

    The observer gets `queries` and `keys`, tuples of B x L x width, multiplied pair by pair, before gates; `attended`,
    the input of an attention's output projection; `hidden`, the input of `linear2`. A deformable attention has no
    queries and keys.

    A block of width 0 is removed: it only adds the bias of its last layer, and has no gates and activations.

    Attributes:
        nheads: number of attention heads.
    """

    nheads: int
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm  # of decoder layers

    def __init__(self, hidden_dim: int, ffn_width: int, activation: str, dropout: float) -> None:
        super().__init__()
        if ffn_width:
            self.linear1 = nn.Linear(hidden_dim, ffn_width)
        self.linear2 = output_layer(ffn_width, hidden_dim)
        if ffn_width:
            self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def last_layer(self, block: str) -> nn.Module:
        """Return the layer after the channels of a block, `OnlyBias` if the block is removed."""
        raise NotImplementedError

    def is_removed(self, block: str) -> bool:
        """Return whether a block has width 0."""
        return isinstance(self.last_layer(block), OnlyBias)

    def other_parameters(self, block: str) -> list[str]:
        """Return the names, in the layer, of a block's parameters that do not shrink with its width."""
        return [f"activation.{name}" for name, _ in self.activation.named_parameters()] if block == "ffn" else []

    @property
    def attention_dropout(self) -> float:
        """Dropout probability of the attention weights; 0 in eval mode."""
        return self.dropout.p if self.training else 0.0

    def ffn(self, x: Tensor) -> Tensor:
        """Return x after the FFN, its residual and the layer's last norm, B x L x hidden_dim."""
        last_norm = self.norm3 if hasattr(self, "norm3") else self.norm2
        return last_norm(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return linear2(gate * activation(linear1(x))), without residual or norm; x is B x L x hidden_dim."""
        if self.is_removed("ffn"):
            hidden = x
        else:
            hidden = gated(self.activation(self.linear1(x)), self.gate("ffn")[0])
            self.observe("ffn", hidden=hidden)
            hidden = self.dropout(hidden)
        added: Tensor = self.linear2(hidden)
        return added


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """Multiply `x` (B x L x width) by its gate; return `x` itself if `gate` is None."""
    return x if gate is None else x * gate


def weights_converted(model: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Return a copy of a model whose weights are those that autocast to `dtype` makes of them, with equal results."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Conv2d) or name in PACKED:
                parameter.data = parameter.data.to(dtype)
    return model


def inverse_sigmoid(x: Tensor, eps: float = ANCHOR_EPS) -> Tensor:
    """Return log(x / (1 - x)) for x in [0, 1], with both terms clamped to at least `eps`."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
