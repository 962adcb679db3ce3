"""The state of the deformable detector between two of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.state import DetectorState


@dataclass(frozen=True)
class LevelSizes:
    """Height and width of the feature map of each level, finest first."""

    sizes_hw: tuple[tuple[int, int], ...]

    def flat(self) -> list[int]:
        """Return [h0, w0, h1, w1, ...] for the sampling operator."""
        return [side for size in self.sizes_hw for side in size]


@dataclass(frozen=True, kw_only=True)
class DeformableState(DetectorState):
    """The tensors between two steps; S counts the feature pixels of all L levels, level after level.

    `memory_mask` is B x S x 1 bool here, True on image pixels; `memory_pos` has the level embedding added.

    Attributes:
        levels: sizes of the levels.
        valid_ratios: B x L x 2 (or 1 x L x 2 if equal for all images), the fractions of each level's width and height
            that are not padding.
    """

    levels: LevelSizes
    valid_ratios: Tensor

    @property
    def pixels(self) -> Tensor:
        """B x S, 1 on image pixels and 0 on padding."""
        if self.memory_mask is None:
            return super().pixels
        return self.memory_mask[:, :, 0].to(self.memory)
