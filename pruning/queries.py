"""Choose the queries that together find most objects of some images.

A query finds an object as well as the product of two numbers: its probability of the object's class, and the IoU of its
box with the object's. A set of queries finds it as well as the best of them does. Queries are added one by one, each
time the one that raises the sum over all objects most (greedy maximum coverage, Nemhauser et al. 1978). The detector is
not retrained. Its decoder mixes queries, so those that stay give other outputs than before; their parameters stay.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from datasets.coco import CocoLoader
from engine import detect, eval_mode
from models.detector import Detector
from pruning.finite_checks import are_finite, image_ids
from util import distributed
from util.errors import NonFiniteLossError, UserError

QUERY_IMAGES = 512  # on the demo set, 128 choose queries with up to 2 AP less


def choose_queries(
    model: Detector, loader: CocoLoader, count: int, *, device: torch.device, amp: str = "off"
) -> Tensor:
    """Return the ascending indices of the `count` anchors whose queries find most objects in the images of `loader`.

    Each process runs a part of the batches; all return the same indices.

    Args:
        loader: all images, in every process.
        amp: off, bf16 or fp16.

    Raises:
        UserError: the images have no objects.
        NonFiniteLossError: a score or a box is not finite; raised in all processes.
    """
    own = range(distributed.rank(), len(loader), distributed.world_size())
    found: dict[int, list[np.ndarray]] = {}
    not_finite: list[int] = []
    with eval_mode(model), torch.no_grad():
        for number, (images, targets) in zip(own, loader.read(own), strict=True):
            sizes_hw = torch.stack([target["orig_size"] for target in targets])
            outputs, _ = detect(model, lambda *_: [], images, sizes_hw, device=device, amp=amp)
            if not are_finite((outputs["pred_logits"], outputs["pred_boxes"])):
                not_finite += image_ids(targets)
            found[number] = [
                found_objects(logits.cpu(), boxes.cpu(), target, model.num_queries)
                for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True)
            ]
    merged: dict[int, list[np.ndarray]] = {}
    for part in distributed.gather_objects(found):
        merged.update(part)
    table = np.concatenate([of_image for number in sorted(merged) for of_image in merged[number]])
    if bad := sorted(image for of_process in distributed.gather_objects(not_finite) for image in of_process):
        raise NonFiniteLossError(f"--keep_queries {count}: scores or boxes are not finite, on the images {bad}")
    if not len(table):
        raise UserError(f"{loader.coco.annotation_file}: found no boxes to choose queries by (--keep_queries)")
    return torch.tensor(distributed.on_main(lambda: most_found(table, count)))


def found_objects(logits: Tensor, boxes_cxcywh: Tensor, target: dict[str, Tensor], num_anchors: int) -> np.ndarray:
    """Return how well each anchor's queries find each object of an image, in [0, 1]: N objects x A anchors.

    Args:
        logits: Q x C, pattern by pattern; Q is a multiple of `num_anchors`.
        boxes_cxcywh: Q x 4 in [0, 1].
        target: `labels` (N) and `boxes` (N x 4 cxcywh in [0, 1]).
    """
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (target["boxes"], boxes_cxcywh))
    found = box_iou(*corners).double() * logits.sigmoid().T[target["labels"]].double()
    return found.unflatten(1, (-1, num_anchors)).amax(1).numpy()


def most_found(table: np.ndarray, count: int) -> list[int]:
    """Return the ascending columns, chosen greedily, with the greatest sum over the rows of their maximum.

    Columns that add nothing come last, by their own sum. A column's gain falls as others are chosen, so it is computed
    again only where its last value is the greatest (Minoux 1978).
    """
    columns = np.ascontiguousarray(table.T)
    best, chosen = np.zeros(len(table)), list[int]()
    totals = [column.sum() for column in columns]
    heap = [(-total, -total, column, 0) for column, total in enumerate(totals)]  # the last entry: columns then chosen
    heapq.heapify(heap)
    while len(chosen) < count:
        _, _, column, known = heap[0]
        if known == len(chosen):
            heapq.heappop(heap)
            chosen.append(column)
            best = np.maximum(best, columns[column])
        else:
            gain = np.maximum(columns[column] - best, 0).sum()
            heapq.heapreplace(heap, (-gain, -totals[column], column, len(chosen)))
    return sorted(chosen)
