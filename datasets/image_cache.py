"""Decoded images in memory, so that training on a small set does not wait for reading and decoding."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from datasets.packing import from_file_order, in_file_order
from util.errors import UserError
from util.memory import USABLE_SHARE, available_ram, processes_here
from util.threads import usable_cores

FIRST_IMAGES = 16  # decoded first, in case the sizes in the annotations are wrong


class ImageCache:
    """The decoded images of a data set, one after another in one tensor.

    Worker processes share the tensor's memory: forked ones inherit it, and torch hands it to others in shared memory.

    Args:
        pictures: the images, each uint8 3 x H x W.
    """

    def __init__(self, pictures: list[Tensor]) -> None:
        self._sizes_hw = [tuple(picture.shape[1:]) for picture in pictures]
        ends = torch.tensor([picture.numel() for picture in pictures]).cumsum(0).tolist()
        self._starts = [0, *ends]
        self._pixels = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
        for index, picture in enumerate(pictures):
            self._pixels[self._starts[index] : self._starts[index + 1]] = in_file_order(picture)
            pictures[index] = picture.new_empty(0)  # frees each image once it is copied

    def picture(self, index: int) -> Tensor:
        """Return an image, uint8 3 x H x W; a view, which must not be changed."""
        return from_file_order(self._pixels[self._starts[index] : self._starts[index + 1]], self._sizes_hw[index])

    @property
    def nbytes(self) -> int:
        """Number of bytes of all images."""
        return self._pixels.nbytes


def read_cache(picture: Callable[[int], Tensor], images: int, listed_bytes: float) -> ImageCache:
    """Decode all images with threads.

    Args:
        picture: maps an index to its image, uint8 3 x H x W.
        images: number of images.
        listed_bytes: bytes of all images as listed in the annotations, which may be wrong; 0 if unknown.

    Raises:
        UserError: the images do not fit in the free RAM.
    """
    check_cache(picture, images, listed_bytes)
    with ThreadPoolExecutor(usable_cores()) as pool:
        return ImageCache(list(pool.map(picture, range(images))))


def cache_bytes(picture: Callable[[int], Tensor], images: int, listed_bytes: float) -> float:
    """Return the bytes that `read_cache` takes at its peak in one process, by the first images and the listed sizes."""
    first = range(min(FIRST_IMAGES, images))
    measured_bytes = images * sum(picture(index).numel() for index in first) / max(1, len(first))
    return 2 * max(listed_bytes, measured_bytes)  # twice while the images are joined


def check_cache(picture: Callable[[int], Tensor], images: int, listed_bytes: float) -> None:
    """Raise a `UserError` if the images do not fit in the free RAM."""
    needed = cache_bytes(picture, images, listed_bytes) * processes_here()
    free = USABLE_SHARE * available_ram()
    if needed > free:
        raise UserError(
            f"--cache_images: {images} decoded images need {needed / 2**30:.1f} GiB of RAM for {processes_here()} "
            f"process{'es' if processes_here() > 1 else ''}, found {free / 2**30:.1f} GiB free, expected a smaller set "
            "or no --cache_images"
        )
