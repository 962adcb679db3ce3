"""Warn about images that differ from their listed size, since their boxes probably use other coordinates.

Reading the headers of all images is slow on a slow disk, so only a few are read before a run; the others are checked
when a loader reads them.
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
    """Warn if images differ from their listed size, by the headers of a sample spread over the data set."""
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
    """Warn if images of a loader's first pass differ from their listed size; call it in every process."""
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
    """Return the warning about images of `other` (found and listed size by file name), among `total` images read."""
    first, (found, listed) = next(iter(other.items()))
    return (
        f"{annotation_file}: {len(other)} of {total} images read differ from their listed size, first "
        f"{shorten(first, 80)} is "
        f"{found[0]} x {found[1]}, listed {listed[0]} x {listed[1]}; expected boxes in the pixels of the files"
    )
