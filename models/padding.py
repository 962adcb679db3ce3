"""Images of different sizes as one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# "exact": an image gives the same alone and in any batch, where nothing is trained. "reference": the rule of DN-DETR.
PADDING_RULES = ("exact", "reference")


class PaddedImages(NamedTuple):
    """A batch of images B x 3 x H x W, and its padding B x H x W (bool, True on padding), None where there is none."""

    batch: Tensor
    padding: Tensor | None


class SizeGroup(NamedTuple):
    """Images of one size, n x 3 x H x W, and the places that they have in the batch."""

    places: list[int]
    batch: Tensor


def pad_images(images: Sequence[Tensor], multiple: int = 1) -> PaddedImages:
    """Pad images at the right and bottom to one size.

    That is the largest height and width among them, each rounded up to a multiple of `multiple` pixels. Images of one
    size are not padded.

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
    """Images (each 3 x H x W) in batches of one size, which need no padding."""
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    return [SizeGroup(group, torch.stack([images[place] for place in group])) for group in places.values()]


def join_maps(groups: Sequence[SizeGroup], maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Feature maps of groups of images as one batch in the images' order, padded with zeros at the right and bottom.

    Args:
        groups: of `group_by_size`.
        maps: of each group n x D x h x w.

    Returns:
        The maps B x D x h x w, and their padding B x h x w (bool, True on padding).
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
    """Padding of a feature map B x h x w: an image of s pixels has ceil(s / stride) rows or columns, as it has alone.

    Args:
        padding: of the images, B x H x W (bool, True on padding).
        size_hw: rows and columns of the map.
        stride: pixels from one row or column of the map to the next.
    """
    rows, columns = (torch.arange(count, device=padding.device) * stride for count in size_hw)
    return padding[:, rows][:, :, columns]


def resize_padding(padding: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Padding B x H x W (bool) at the size of a feature map, nearest: B x h x w.

    This is the reference's rule. Unless H is a multiple of the stride, it can mark a row or column as valid that a
    smaller image does not have.

    The places are whole numbers, because those that `F.interpolate` rounds come out one lower in other runtimes.
    """
    rows, columns = (
        torch.arange(small, device=padding.device) * whole // small
        for small, whole in zip(size_hw, padding.shape[1:], strict=True)
    )
    return padding[:, rows][:, :, columns]
