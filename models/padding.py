"""Images of different sizes as one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PaddedImages(NamedTuple):
    """Images that are padded already: B x 3 x H x W, and their padding B x H x W (bool, True on padding)."""

    batch: Tensor
    padding: Tensor


def pad_images(images: list[Tensor] | Tensor | PaddedImages) -> tuple[Tensor, Tensor, bool]:
    """Pad images at the right and bottom to the largest height and width among them.

    Args:
        images: list of 3 x H x W, or one B x 3 x H x W, which needs no padding; or what is padded
            already, of which it is not asked whether its padding is empty.

    Returns:
        The batch B x 3 x H x W, its padding B x H x W (bool, True on padding), and whether there is any.
    """
    if isinstance(images, PaddedImages):
        return images.batch, images.padding, True
    if isinstance(images, Tensor):
        batch_size, _, height, width = images.shape
        return images, images.new_zeros(batch_size, height, width, dtype=torch.bool), False
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    first = images[0]
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=first.device)
    for mask, image in zip(padding, images, strict=True):
        mask[: image.shape[1], : image.shape[2]] = False
    if all(image.shape == first.shape for image in images):
        return torch.stack(list(images)), padding, False
    batch = first.new_zeros(len(images), first.shape[0], height, width)
    for canvas, image in zip(batch, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return batch, padding, True


def resize_padding(padding: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Padding B x H x W (bool) at the size of a feature map, nearest: B x h x w.

    The places are whole numbers, for those that `F.interpolate` rounds come out one lower in other runtimes.
    """
    rows, columns = (
        torch.arange(small, device=padding.device) * whole // small
        for small, whole in zip(size_hw, padding.shape[1:], strict=True)
    )
    return padding[:, rows][:, :, columns]
