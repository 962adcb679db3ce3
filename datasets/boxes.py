"""Find boxes that cannot be learned: without area, outside their image, or below a pixel (such as relative boxes)."""

import logging
from pathlib import Path

import numpy as np

from datasets.annotations import Annotations, load_annotations
from util.errors import UserError
from util.logging import Notice

MIN_SIDE = 1.0  # pixels
ROUNDING = 1e-3  # of sides and ends, in pixels
WARNED_SHARE = 0.01  # of the boxes; COCO's own files contain a few unusable ones


def are_below_pixel(boxes_xywh: np.ndarray, sizes_wh: np.ndarray) -> np.ndarray:
    """Return which boxes have a side below one pixel inside their image, or lie in its first pixel (bool N).

    This includes every box in relative coordinates, even that of a whole image.

    Args:
        boxes_xywh: N x 4, in pixels of the image file.
        sizes_wh: N x 2 or 2, width and height of the image.
    """
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    sides = np.minimum(ends, sizes_wh) - np.maximum(boxes_xywh[:, :2], 0)
    return (sides < MIN_SIDE - ROUNDING).any(axis=1) | (ends <= 1 + ROUNDING).all(axis=1)


def box_counts(annotations: Annotations) -> dict[str, int]:
    """Count the boxes without crowds: `all`, and those that training skips by reason, each box once."""
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
    """Raise `UserError` if there are boxes and training would skip all of them."""
    total, skipped, kinds = _skipped_boxes(annotation_file)
    if total and skipped == total:
        raise UserError(
            f"{annotation_file}: found no usable box among {total} ({kinds}), expected x, y, width and height in "
            "pixels of the image files"
        )


def training_box_notices(annotation_file: Path) -> list[Notice]:
    """Report how many boxes training skips, without crowds: as a warning if they are many or there are no boxes."""
    total, skipped, kinds = _skipped_boxes(annotation_file)
    if not total:
        return [(logging.WARNING, f"{annotation_file}: found no boxes, so there are no objects to learn")]
    if not skipped:
        return []
    level = logging.WARNING if skipped > WARNED_SHARE * total else logging.INFO
    return [(level, f"{annotation_file}: training skips {skipped} of {total} boxes ({kinds})")]


def measured_box_notices(annotation_file: Path) -> list[Notice]:
    """Warn if there are no boxes to measure AP with, or if AP means little because many are below a pixel."""
    counts = box_counts(load_annotations(annotation_file))
    total, below = counts["all"], counts["below a pixel"]
    if not total:
        return [(logging.WARNING, f"{annotation_file}: found no boxes, so AP cannot be measured")]
    if below <= WARNED_SHARE * total:
        return []
    expected = "expected x, y, width and height in pixels of the image files"
    return [(logging.WARNING, f"{annotation_file}: {below} of {total} boxes are below a pixel, {expected}")]


def query_notices(annotation_file: Path, num_queries: int) -> list[Notice]:
    """Warn if images have more objects than the detector has queries, each of which finds at most one."""
    counts = load_annotations(annotation_file).object_counts()
    images = int((counts > num_queries).sum())
    if not images:
        return []
    found = f"{images} of {len(counts)} images have more objects (up to {counts.max()}) than the detector has queries"
    return [(logging.WARNING, f"{annotation_file}: {found} ({num_queries}), which find at most one each")]


def _skipped_boxes(annotation_file: Path) -> tuple[int, int, str]:
    """Return the number of boxes, the number that training skips, and the latter by reason as text."""
    counts = box_counts(load_annotations(annotation_file))
    total = counts.pop("all")
    return total, sum(counts.values()), ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
