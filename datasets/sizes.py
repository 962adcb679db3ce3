"""Images of another size than their annotation file lists: their boxes most likely count in other pixels.

Reading the headers of all images takes too long on a slow disk. So a few are read before a run, and the others are
counted as a loader gives them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from datasets.coco import CocoDataset, CocoLoader
from datasets.decode import read_size
from util import distributed
from util.errors import shorten
from util.logging import Notice

HEADERS = 64  # read before a run
Size = tuple[int, int]  # width and height


def header_notices(dataset: CocoDataset) -> list[Notice]:
    """A warning if some images, spread over the data set, are of another size than listed; their headers are read."""
    if not distributed.is_main():
        return []
    indices = range(0, len(dataset), -(-len(dataset) // HEADERS))
    other = {}
    for index in indices:
        listed = dataset.annotations.listed_size_wh(index)
        found = None if listed is None else read_size(dataset.image_path(index), listed)
        if found is not None and found != listed:
            other[dataset.annotations.file_names[index]] = (found, listed)
    return [(logging.WARNING, size_warning(dataset.annotation_file, other, len(indices)))] if other else []


def size_notices(loader: CocoLoader) -> list[Notice]:
    """A warning if images of a loader's first pass are of another size than listed; call it in every process."""
    if loader.sizes_counted:
        return []
    loader.sizes_counted = True
    other: dict[str, tuple[Size, Size]] = {}
    read: set[int] = set()
    for part, ids in distributed.gather_objects((loader.other_sizes, loader.images_read)):
        other |= part
        read |= ids
    if not other or not distributed.is_main():
        return []
    return [(logging.WARNING, size_warning(loader.coco.annotation_file, other, len(read)))]


def size_warning(annotation_file: str | Path, other: Mapping[str, tuple[Size, Size]], total: int) -> str:
    """The warning about images, by file name with the size found and the size listed, among `total` that were read."""
    first, (found, listed) = next(iter(other.items()))
    return (
        f"{annotation_file}: {len(other)} of {total} images read are of another size than listed, first "
        f"{shorten(first, 80)} is "
        f"{found[0]} x {found[1]}, listed {listed[0]} x {listed[1]}; expected boxes in the pixels of the files"
    )
