"""Find images that two splits share, because AP on images used for fitting is biased."""

from __future__ import annotations

import os

from datasets.annotations import load_annotations
from datasets.coco import Split

HEAD_BYTES = 4096  # files of equal names and sizes are compared this far


def shared_images(split: Split, other: Split) -> list[str]:
    """Return the file names in `split` of images that `other` also lists.

    An image is shared if both annotation files name the same file, or if a file of the same name in the other folder is
    a link to it or has the same size and first bytes.
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
    """Return the annotated file names by absolute path; links are resolved once, for the folder."""
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
    except OSError:  # a missing file is reported when it is read
        return False
