"""Boxes that no run can learn: without area, outside their image, or below a pixel, as boxes in fractions of it are."""

import logging
from pathlib import Path

import numpy as np

from datasets.annotations import Annotations, load_annotations
from util.errors import UserError
from util.logging import Notice

MIN_SIDE = 1.0  # pixels
ROUNDING = 1e-3  # of sides and ends, in pixels
WARNED_SHARE = 0.01  # of the boxes; COCO's own files have some that are left out


def are_below_pixel(boxes_xywh: np.ndarray, sizes_wh: np.ndarray) -> np.ndarray:
    """Which boxes (N x 4) have less than a pixel of a side in their image, or lie in its first pixel (bool N).

    A box in fractions of its image is one of these, the box of a whole image too.

    Args:
        boxes_xywh: in pixels of the image file.
        sizes_wh: N x 2 or 2, width and height of the image.
    """
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    sides = np.minimum(ends, sizes_wh) - np.maximum(boxes_xywh[:, :2], 0)
    return (sides < MIN_SIDE - ROUNDING).any(axis=1) | (ends <= 1 + ROUNDING).all(axis=1)


def box_counts(annotations: Annotations) -> dict[str, int]:
    """Boxes of an annotation file by kind, crowds left out: `all`, and of those that training leaves out each once."""
    rows = ~annotations.are_crowds
    boxes = annotations.boxes_xywh[rows]
    sizes = annotations.sizes_wh[np.searchsorted(annotations.image_ids, annotations.box_image_ids[rows])]
    sizes = np.where(sizes > 0, sizes, np.inf)
    empty = (boxes[:, 2:] <= 0).any(axis=1)
    outside = ~empty & ((boxes[:, :2] >= sizes) | (boxes[:, :2] + boxes[:, 2:] <= 0)).any(axis=1)
    below = ~empty & ~outside & are_below_pixel(boxes, sizes)
    return {
        "all": len(boxes),
        "without area": int(empty.sum()),
        "outside their image": int(outside.sum()),
        "below a pixel": int(below.sum()),
    }


def require_training_boxes(annotation_file: Path) -> None:
    """Raise `UserError` where there are boxes, and training leaves out all of them."""
    total, left_out, kinds = _left_out(annotation_file)
    if total and left_out == total:
        raise UserError(
            f"{annotation_file}: found no box to learn among {total} ({kinds}), expected x, y, width and height in "
            "pixels of the image files"
        )


def training_box_notices(annotation_file: Path) -> list[Notice]:
    """How many boxes training leaves out, crowds aside; a warning where they are many, or where there is no box."""
    total, left_out, kinds = _left_out(annotation_file)
    if not total:
        return [(logging.WARNING, f"{annotation_file}: found no boxes, so there are no objects to learn")]
    if not left_out:
        return []
    level = logging.WARNING if left_out > WARNED_SHARE * total else logging.INFO
    return [(level, f"{annotation_file}: training leaves out {left_out} of {total} boxes ({kinds})")]


def measured_box_notices(annotation_file: Path) -> list[Notice]:
    """A warning where AP cannot be measured for want of boxes, or means little because many are below a pixel."""
    counts = box_counts(load_annotations(annotation_file))
    total, below = counts["all"], counts["below a pixel"]
    if not total:
        return [(logging.WARNING, f"{annotation_file}: found no boxes, so AP cannot be measured")]
    if below <= WARNED_SHARE * total:
        return []
    expected = "expected x, y, width and height in pixels of the image files"
    return [(logging.WARNING, f"{annotation_file}: {below} of {total} boxes are below a pixel, {expected}")]


def query_notices(annotation_file: Path, num_queries: int) -> list[Notice]:
    """A warning where images have more objects than a detector has queries, each of which finds at most one."""
    counts = load_annotations(annotation_file).object_counts()
    images = int((counts > num_queries).sum())
    if not images:
        return []
    found = f"{images} of {len(counts)} images have more objects (up to {counts.max()}) than the detector has queries"
    return [(logging.WARNING, f"{annotation_file}: {found} ({num_queries}), which find at most one each")]


def _left_out(annotation_file: Path) -> tuple[int, int, str]:
    """Number of boxes, of those that training leaves out, and how many of each kind these are."""
    counts = box_counts(load_annotations(annotation_file))
    total = counts.pop("all")
    return total, sum(counts.values()), ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
