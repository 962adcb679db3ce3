"""The state of a detector between two of its steps, which a search can cache and resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """The projected backbone features of a batch of images, from which the first state is computed.

    Attributes:
        memory: B x S x D, projected features.
        paddings: bool for each feature level, True on padding; B x h x w, or 1 x h x w without padding.
        is_padded: whether the batch has padding.
    """

    memory: Tensor
    paddings: tuple[Tensor, ...]
    is_padded: bool

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Features:
        """Return a copy on `device`, with the memory in `dtype` if given."""
        return replace(self, memory=self.memory.to(device, dtype), paddings=tuple(p.to(device) for p in self.paddings))

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (self.memory, *self.paddings))


@dataclass(frozen=True)
class DenoisingQueries:
    """Layout of the denoising queries.

    Attributes:
        num_queries: number of denoising queries, `groups * largest target count`; they precede the matching queries.
        groups: number of noised copies of each target.
    """

    num_queries: int
    groups: int


class QueryFields(TypedDict):
    """The query fields of a `DetectorState`."""

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
        memory: B x S x D, the encoder's features after the steps so far.
        memory_pos: B x S x D (or 1 x S x D if equal for all images), sine encoding of the pixels.
        memory_mask: B x 1 x 1 x S bool, True on image pixels; None without padding.
        queries: B x Q x D, content of the decoder's queries.
        query_mask: Q x Q bool, True where a query may attend; None without denoising queries.
        anchors: B x Q x 4 cxcywh in [0, 1], for the layer's attention (no gradient to the previous layer).
        live_anchors: the same with gradient; the layer's box offsets are added to them.
        query_pos, query_sine: B x Q x D, positional queries of the current decoder layer; None before the first.
        hidden: B x Q x D for each finished decoder layer, normalised.
        boxes: B x Q x 4 cxcywh for each finished decoder layer.
        denoising: layout of the denoising queries, None without them.
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
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def map(self: StateT, function: Callable[[Tensor], Tensor]) -> StateT:
        """Return a copy with `function` applied to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return tuple(function(t) for t in value) if isinstance(value, tuple) else value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self: StateT, device: torch.device | str) -> StateT:
        """Return a copy on another device."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def pixels(self) -> Tensor:
        """B x S, 1 on image pixels and 0 on padding."""
        if self.memory_mask is None:
            return self.memory.new_ones(self.memory.shape[:2])
        return self.memory_mask[:, 0, 0].to(self.memory)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the state."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, tuple):
                yield from value
