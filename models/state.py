"""What flows through a detector between two of its steps, as a value that a search can keep and start from again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What the front of a detector makes of a batch of images; all else of the first state follows from it.

    Attributes:
        memory: B x S x D, projected features.
        paddings: for each feature level B x h x w (1 x h x w where all images are alike) bool, True on padding.
        is_padded: False where the batch has no padding at all.
    """

    memory: Tensor
    paddings: tuple[Tensor, ...]
    is_padded: bool

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Features:
        """A copy elsewhere, the memory in another precision if one is given."""
        return replace(self, memory=self.memory.to(device, dtype), paddings=tuple(p.to(device) for p in self.paddings))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (self.memory, *self.paddings))


@dataclass(frozen=True)
class DenoisingQueries:
    """Where the noised copies of the targets stand among the queries.

    Attributes:
        num_queries: number of denoising queries in front of the matching ones, `groups * largest target count`.
        groups: number of noised copies of every target.
    """

    num_queries: int
    groups: int


class QueryFields(TypedDict):
    """The fields of a `DetectorState` that hold the queries."""

    queries: Tensor
    query_mask: Tensor | None
    anchors: Tensor
    live_anchors: Tensor
    denoising: DenoisingQueries | None


StateT = TypeVar("StateT", bound="DetectorState")


@dataclass(frozen=True)
class DetectorState:
    """The tensors between two steps; B images, S feature pixels, Q queries, D channels.

    Attributes:
        memory: B x S x D, the encoder's features, encoded as far as the steps have gone.
        memory_pos: B x S x D (or 1 x S x D where all images are alike), sine encoding of the pixels.
        memory_mask: B x 1 x 1 x S bool, True on image pixels; None without padding.
        queries: B x Q x D, the decoder's content.
        query_mask: Q x Q bool, True where a query may look; None without denoising queries.
        anchors: B x Q x 4 cxcywh in [0, 1], which the layer attends with (no gradient to the layer before).
        live_anchors: the same with its gradient, which the layer's boxes are offsets of.
        query_pos, query_sine: B x Q x D, positional queries of the decoder layer under way; None before the first.
        hidden: B x Q x D for each decoder layer done, normalised.
        boxes: B x Q x 4 cxcywh for each decoder layer done.
        denoising: None where there are no denoising queries.
    """

    memory: Tensor
    memory_pos: Tensor
    memory_mask: Tensor | None
    queries: Tensor
    query_mask: Tensor | None
    anchors: Tensor
    live_anchors: Tensor
    query_pos: Tensor | None = None
    query_sine: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()
    boxes: tuple[Tensor, ...] = ()
    denoising: DenoisingQueries | None = None

    def replace(self: StateT, **changes: Any) -> StateT:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def map(self: StateT, function: Callable[[Tensor], Tensor]) -> StateT:
        """A copy with `function` applied to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return tuple(function(t) for t in value) if isinstance(value, tuple) else value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self: StateT, device: torch.device | str) -> StateT:
        """A copy on another device."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def pixels(self) -> Tensor:
        """B x S, 1 on image pixels and 0 on padding."""
        if self.memory_mask is None:
            return self.memory.new_ones(self.memory.shape[:2])
        return self.memory_mask[:, 0, 0].to(self.memory)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the state."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, tuple):
                yield from value
