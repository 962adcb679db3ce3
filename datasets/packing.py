"""Pack a batch of samples for its way from a worker process to the device, with pictures in uint8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.transforms import model_input, resized

Target = dict[str, Tensor]


class RawSample(NamedTuple):
    """A sample of a data set.

    Attributes:
        picture: uint8 3 x H x W, transformed except for the last resize.
        size_hw: height and width after the last resize.
        target: see `datasets.coco.CocoDataset`.
    """

    picture: Tensor
    size_hw: tuple[int, int]
    target: Target


class PackedBatch(NamedTuple):
    """A batch as one tensor; a tensor for each picture and target would take a file handle each.

    Attributes:
        levels: grey levels of all pictures, uint8, in the order of `in_file_order`.
        packed_hw: height and width of each picture in `levels`.
        sizes_hw: those after the last resize.
        targets: of each picture.
    """

    levels: Tensor
    packed_hw: list[Sequence[int]]
    sizes_hw: list[Sequence[int]]
    targets: list[dict[str, np.ndarray]]


def in_file_order(picture: Tensor) -> Tensor:
    """Flatten a picture (3 x H x W) row by row with the three colours of a pixel together, as decoders store it."""
    return picture.permute(1, 2, 0).reshape(-1)


def from_file_order(levels: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Undo `in_file_order`; the picture is a view."""
    return levels.view(*size_hw, 3).permute(2, 0, 1)


def pack(samples: Sequence[RawSample], *, resizes: bool) -> PackedBatch:
    """Pack a batch.

    Args:
        samples: its samples.
        resizes: resize all pictures here. Otherwise pictures that the resize enlarges are packed as they are, which is
            less to send, and `unpack` resizes them.
    """
    pictures = [
        resized(picture, size_hw) if resizes or math.prod(picture.shape[1:]) > math.prod(size_hw) else picture
        for picture, size_hw, _ in samples
    ]
    return PackedBatch(
        torch.cat([in_file_order(picture) for picture in pictures]),
        [tuple(picture.shape[1:]) for picture in pictures],
        [sample.size_hw for sample in samples],
        [{name: value.numpy() for name, value in sample.target.items()} for sample in samples],
    )


def unpack(batch: PackedBatch, device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Return the normalised images of a batch (each float32 3 x h x w) on `device`, and their targets on the CPU."""
    levels, sizes = batch.levels.to(device, non_blocking=True), [*zip(batch.packed_hw, batch.sizes_hw, strict=True)]
    if all(size == sizes[0] for size in sizes):  # a GPU computes on all pictures at once
        packed_hw, size_hw = sizes[0]
        pictures = levels.view(len(sizes), *packed_hw, 3).permute(0, 3, 1, 2)
        images = [*model_input(pictures, size_hw).unbind()]
    else:
        parts = levels.split([3 * math.prod(packed_hw) for packed_hw, _ in sizes])
        images = [
            model_input(from_file_order(part, packed_hw), size_hw)
            for part, (packed_hw, size_hw) in zip(parts, sizes, strict=True)
        ]
    return images, [{name: torch.from_numpy(np.asarray(v)) for name, v in target.items()} for target in batch.targets]
