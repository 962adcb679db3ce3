"""The states of a detector before and between its steps, which a search can cache and resume from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenoisingQueries:
    """Layout of the denoising queries and of the other queries before the matching ones.

    Attributes:
        num_queries: number of denoising queries, `groups * largest target count`; they come first.
        groups: number of noised copies of each target.
        anchors: sizes of the groups of shared anchors, whose queries follow the denoising ones; see `ExtraQueries`.
    """

    num_queries: int
    groups: int
    anchors: tuple[int, ...] = ()

    @property
    def num_extra(self) -> int:
        """Number of queries that precede the matching ones."""
        return self.num_queries + sum(self.anchors)


class QueryFields(TypedDict):
    """The query fields of a `DetectorState`."""

    queries: Tensor
    query_mask: Tensor | None
    anchors: Tensor
    live_anchors: Tensor
    denoising: DenoisingQueries | None


StateT = TypeVar("StateT", bound="State")


@dataclass(frozen=True)
class State:
    """Base class of the states: dataclasses of tensors, tuples of tensors and other values."""

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

    def to(self: StateT, device: torch.device | str, dtype: torch.dtype | None = None) -> StateT:
        """Return a copy on another device, with floating-point tensors in `dtype` if given."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the state."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, tuple):
                yield from value

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    @abstractmethod
    def content(self) -> Tensor:
        """The tensor that the next step changes, one row for each image."""

    @property
    @abstractmethod
    def pixels_of_image(self) -> int:
        """Feature pixels of an image, padding included."""

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.content)


@dataclass(frozen=True)
class Features(State):
    """The projected backbone features of a batch of images, from which the first state is computed.

    Attributes:
        memory: B x S x D, projected features.
        paddings: bool for each feature level, True on padding; B x h x w, or 1 x h x w without padding.
        is_padded: whether the batch has padding.
    """

    memory: Tensor
    paddings: tuple[Tensor, ...]
    is_padded: bool

    @property
    def content(self) -> Tensor:
        """The features."""
        return self.memory

    @property
    def pixels_of_image(self) -> int:
        """Feature pixels of an image of all levels, padding included."""
        return self.memory.shape[1]


@dataclass(frozen=True)
class BackboneState(State):
    """The tensors at the input of a residual block, for a batch of images of one size or padded to one size.

    Attributes:
        maps: B x C x H x W, the block's input.
        levels: finished feature levels that the transformer reads, each B x C x H x W.
        padding: B x H x W bool of the images, True on padding; None without padding.
    """

    maps: Tensor
    levels: tuple[Tensor, ...] = ()
    padding: Tensor | None = None

    @property
    def content(self) -> Tensor:
        """The block's input."""
        return self.maps

    @property
    def pixels_of_image(self) -> int:
        """Pixels of the map, padding included."""
        return self.maps[0, 0].numel()


@dataclass(frozen=True)
class DetectorState(State):
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

    @property
    def content(self) -> Tensor:
        """Content of the queries."""
        return self.queries

    @property
    def pixels_of_image(self) -> int:
        """Feature pixels of an image, padding included."""
        return self.memory.shape[1]

    @property
    def pixels(self) -> Tensor:
        """B x S, 1 on image pixels and 0 on padding."""
        if self.memory_mask is None:
            return self.memory.new_ones(self.memory.shape[:2])
        return self.memory_mask[:, 0, 0].to(self.memory)
