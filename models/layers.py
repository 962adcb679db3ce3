"""Small building blocks that the encoder, the decoder and the heads share."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Called with the name of a block and some of its activations.
Observer = Callable[[str, dict[str, Any]], None]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What DN-DETR bounds the coordinates of anchors and noised boxes by before it takes their logits.
ANCHOR_EPS = 1e-3
ACTIVATIONS: dict[str, type[nn.Module]] = {"prelu": nn.PReLU, "relu": nn.ReLU}


def module_list(modules: Iterable[ModuleT]) -> Sequence[ModuleT]:
    """An `nn.ModuleList`, which keeps no type of what it holds, as a sequence that does."""
    return cast(Sequence[ModuleT], nn.ModuleList(modules))


def at_least_float32(tensor: Tensor) -> Tensor:
    """16-bit numbers as float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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


class OutputProjection(nn.Module):
    """The projection behind the heads of an attention; a module of its own for the sake of its state-dict name."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(width, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """B x L x width -> B x L x hidden_dim."""
        return self.out_proj(x)


class GatedLayer(nn.Module):
    """Base of the transformer layers: holds the gates of its modules and the feed-forward block.

    A gate multiplies exactly the channels that a cut would remove, so that the gated layer and the cut one compute the
    same function. `gates[block]` is `(query gate, value gate)` for an attention, `(value gate, None)` for a deformable
    one and `(hidden gate, None)` for the FFN; a gate has the shape `width`, or `B x 1 x width` for one gate an image.
    Gates are no part of the state dict.

    `observer`, where there is one, is called with a block's name and its activations as they come by: `queries` and
    `keys`, tuples of B x L x width that are multiplied with each other pair by pair, before any gate; `attended`, what
    the output projection of an attention is given; `hidden`, what `linear2` is given. A deformable attention has no
    queries and keys to show.

    Attributes:
        nheads: attention heads.
    """

    nheads: int

    def __init__(self, hidden_dim: int, ffn_width: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, ffn_width)
        self.linear2 = nn.Linear(ffn_width, hidden_dim)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.gates: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.observer: Observer | None = None

    @property
    def attention_dropout(self) -> float:
        """Probability with which an attention weight is dropped: 0 outside training."""
        return self.dropout.p if self.training else 0.0

    def gate(self, block: str) -> tuple[Tensor | None, Tensor | None]:
        """The gates of one module of this layer, `(None, None)` where it has none."""
        return self.gates.get(block, (None, None))

    def observe(self, block: str, **activations: Tensor | tuple[Tensor, ...] | None) -> None:
        """Show activations of one block to the observer."""
        if self.observer is not None:
            self.observer(block, activations)

    def feed_forward(self, x: Tensor) -> Tensor:
        """linear2(gate * activation(linear1(x))), without residual or norm; x is B x L x hidden_dim."""
        hidden = gated(self.activation(self.linear1(x)), self.gate("ffn")[0])
        self.observe("ffn", hidden=hidden)
        return self.linear2(self.dropout(hidden))


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """`x` (B x L x width) times its gate, or `x` itself where there is none."""
    return x if gate is None else x * gate


def inverse_sigmoid(x: Tensor, eps: float = ANCHOR_EPS) -> Tensor:
    """log(x / (1 - x)) with both terms bounded below by `eps`, for x in [0, 1]."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
