"""Image files that two splits have in common: AP on images that a detector was fitted to is no fair figure."""

from __future__ import annotations

import os
from pathlib import Path

from datasets.annotations import load_annotations
from datasets.coco import Split

HEAD_BYTES = 4096  # files of equal names and sizes are compared this far


def shared_images(split: Split, other: Split) -> list[str]:
    """File names in `split` of the images that `other` lists, too.

    An image counts if both annotation files name the same file, directly or by a link, or if the file of that name in
    the other folder has the same size and the same first bytes, as a copy has.
    """
    own, others = _paths(split), _paths(other)
    same_path = own.keys() & others.keys()
    by_name = {Path(path).name: path for path in others}
    shared = []
    for path, file_name in own.items():
        namesake = by_name.get(Path(path).name)
        if path in same_path or (namesake is not None and _is_copy(path, namesake)):
            shared.append(file_name)
    return shared


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
