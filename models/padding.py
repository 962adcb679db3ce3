"""Batch images of different sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.backbone import PartialFeatures

# "exact": in eval mode, the result of an image does not depend on its batch. "reference": the rule of DN-DETR.
PADDING_RULES = ("exact", "reference")


class PaddedImages(NamedTuple):
    """A batch of images, padded to one size.

    Attributes:
        batch: B x 3 x H x W.
        padding: B x H x W bool, True on padding; None without padding.
        begun: what the backbone's first layers give for them, if they have run.
    """

    batch: Tensor
    padding: Tensor | None
    begun: PartialFeatures | None = None


class SizeGroup(NamedTuple):
    """Images of one size (n x 3 x H x W) and their indices in the batch."""

    places: list[int]
    batch: Tensor


def pad_images(images: Sequence[Tensor], multiple: int = 1) -> PaddedImages:
    """Pad images at the right and bottom to one size.

    The size is the largest height and width, each rounded up to a multiple of `multiple` pixels. Images of equal size
    are not padded.

    Args:
        images: each 3 x H x W.
        multiple: pixels.
    """
    first = images[0]
    if all(image.shape == first.shape for image in images):
        return PaddedImages(torch.stack(list(images)), None)
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    batch = first.new_zeros(len(images), first.shape[0], height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=first.device)
    for canvas, mask, image in zip(batch, padding, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
        mask[: image.shape[1], : image.shape[2]] = False
    return PaddedImages(batch, padding)


def group_by_size(images: Sequence[Tensor]) -> list[SizeGroup]:
    """Group images (each 3 x H x W) into batches of equal size, which need no padding."""
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    return [SizeGroup(group, torch.stack([images[place] for place in group])) for group in places.values()]


def join_maps(groups: Sequence[SizeGroup], maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join the feature maps of groups to one batch in the images' order, zero-padded at the right and bottom.

    Args:
        groups: groups of `group_by_size`.
        maps: feature map of each group, n x D x h x w.

    Returns:
        The maps (B x D x h x w) and their padding (B x h x w bool, True on padding).
    """
    count = sum(len(group.places) for group in groups)
    height, width = (max(group_map.shape[axis] for group_map in maps) for axis in (2, 3))
    first = maps[0]
    joined = first.new_zeros(count, first.shape[1], height, width)
    padding = torch.ones(count, height, width, dtype=torch.bool, device=first.device)
    for group, group_map in zip(groups, maps, strict=True):
        rows, columns = group_map.shape[2:]
        joined[group.places, :, :rows, :columns] = group_map
        padding[group.places, :rows, :columns] = False
    return joined, padding


def padding_of_map(padding: Tensor, size_hw: Sequence[int], stride: int) -> Tensor:
    """Return a feature map's padding (B x h x w): an image side of s pixels has ceil(s / stride) valid rows or columns.

    Args:
        padding: padding of the images, B x H x W (bool, True on padding).
        size_hw: rows and columns of the map.
        stride: stride of the map in pixels.
    """
    rows, columns = (torch.arange(count, device=padding.device) * stride for count in size_hw)
    return padding[:, rows][:, :, columns]


def resize_padding(padding: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Resize padding (B x H x W bool) to a feature map (B x h x w) by nearest neighbour, the reference's rule.

    Unless H is a multiple of the stride, it can mark a row or column as valid that a smaller image does not have.

    Indices are computed in integers, because those that `F.interpolate` rounds can be one lower in other runtimes.
    """
    rows, columns = (
        torch.arange(small, device=padding.device) * whole // small
        for small, whole in zip(size_hw, padding.shape[1:], strict=True)
    )
    return padding[:, rows][:, :, columns]
