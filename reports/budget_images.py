"""What the detectors of several budgets find in the first images of val2017: AP by category, and errors by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from datasets.coco import CocoDataset
from datasets.coco_eval import GroundTruth, ap_by_category, coco_stats, to_detections
from models.config import DetectorConfig
from reports.samples import THRESHOLD, Result, Samples, annotated

LEAST_IOU = 0.5  # of a box that counts as found


@dataclass(frozen=True)
class Findings:
    """What one detector finds.

    Attributes:
        results: scores, labels and boxes (xyxy in the image's pixels) of each image.
        ap: over all images in [0, 1], or -1 if they have no boxes.
        ap_by_category: the same for each category with boxes, by id.
        errors: of each image: objects missed plus detections of nothing, at scores of `THRESHOLD` or more.
    """

    results: Sequence[Result]
    ap: float
    ap_by_category: Mapping[int, float]
    errors: Sequence[int]


def find(samples: Samples, path: Path, config: DetectorConfig, dataset: CocoDataset) -> Findings:
    """Run the detector of a checkpoint on the first `samples.images` images.

    Raises:
        UserError: the checkpoint or an image cannot be read.
    """
    indices = range(min(samples.images, len(dataset)))
    results = samples.detect(path, config, dataset, indices)
    ids = [dataset.ids[index] for index in indices]
    ground_truth = GroundTruth(dataset.annotation_file, ids)
    rows = [to_detections(number, result) for number, result in zip(ids, results, strict=True)]
    detections = np.concatenate(rows) if rows else np.zeros((0, 7))
    by_category = {
        number: figures["AP"]
        for number, figures in ap_by_category(ground_truth, detections, ids).items()
        if figures["AP"] >= 0
    }
    ap = coco_stats(ground_truth, detections, image_ids=ids)["AP"]
    errors = [errors_of(result, annotated(dataset, i)) for i, result in zip(indices, results, strict=True)]
    return Findings(results, ap, by_category, errors)


def errors_of(result: Result, objects: Result) -> int:
    """Return the objects that no detection finds plus the detections that find none, as shown by a threshold.

    Detections choose objects of their category with an IoU of `LEAST_IOU` or more, the highest score first.

    Args:
        result: scores (K), labels (K) and boxes (K x 4 xyxy).
        objects: labels (N) and boxes (N x 4 xyxy) of the annotations.
    """
    order = result["scores"].argsort(descending=True, stable=True)
    order = order[result["scores"][order] >= THRESHOLD]
    labels, boxes = result["labels"][order], result["boxes"][order]
    ious = box_iou(boxes, objects["boxes"].to(boxes))
    ious[labels[:, None] != objects["labels"][None].to(labels)] = 0
    is_left, found = torch.ones(len(objects["labels"]), dtype=torch.bool), 0
    for overlaps in ious:
        candidates: Tensor = overlaps * is_left
        if len(candidates) and candidates.max() >= LEAST_IOU:
            is_left[candidates.argmax()] = False
            found += 1
    return int(is_left.sum()) + len(order) - found


def worst_images(before: Findings, after: Findings, count: int) -> list[tuple[int, int]]:
    """Return index and additional errors of the images that got worse, the worst first, at most `count`."""
    more = [(after.errors[index] - errors, -index) for index, errors in enumerate(before.errors)]
    return [(-index, added) for added, index in sorted(more, reverse=True)[:count] if added > 0]


def category_changes(before: Findings, after: Findings) -> list[tuple[int, float, float]]:
    """Return id, AP before and AP after of each category with boxes, the largest loss first."""
    pairs = [(number, ap, after.ap_by_category[number]) for number, ap in before.ap_by_category.items()]
    return sorted(pairs, key=lambda pair: (pair[2] - pair[1], pair[0]))
