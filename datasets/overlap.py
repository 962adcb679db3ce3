"""Image files that two splits have in common: AP on images that a detector was fitted to is no fair figure."""

from __future__ import annotations

import os

from datasets.annotations import load_annotations
from datasets.coco import Split

HEAD_BYTES = 4096  # files of equal names and sizes are compared this far


def shared_images(split: Split, other: Split) -> list[str]:
    """File names in `split` of the images that `other` lists, too.

    An image counts if both annotation files name the same file, or if a file of that name in the other folder is a link
    to it or has the same size and the same first bytes, as a copy has.
    """
    own, others = _paths(split), _paths(other)
    same_path = own.keys() & others.keys()
    by_name: dict[str, list[str]] = {}
    for path in others:
        by_name.setdefault(os.path.basename(path), []).append(path)
    return [
        file_name
        for path, file_name in own.items()
        if path in same_path or any(_is_copy(path, namesake) for namesake in by_name.get(os.path.basename(path), []))
    ]


def _paths(split: Split) -> dict[str, str]:
    """Absolute path -> file name as the annotations have it; one look at the folder resolves its links."""
    folder = os.path.realpath(split.image_folder)
    names = load_annotations(split.annotation_file).file_names
    return {os.path.normpath(os.path.join(folder, name)): name for name in names}


def _is_copy(path: str, other: str) -> bool:
    try:
        if os.path.samefile(path, other):
            return True
        if os.path.getsize(path) != os.path.getsize(other):
            return False
        with open(path, "rb") as one, open(other, "rb") as two:
            return one.read(HEAD_BYTES) == two.read(HEAD_BYTES)
    except OSError:  # a missing file is reported where it is read
        return False
