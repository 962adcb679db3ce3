"""Hungarian matching between queries and targets, for all decoder layers at once (DETR, arXiv 2005.12872, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.layers import at_least_float32, numbers_on

UNMATCHABLE_COST = 1e6
LEAST_AREA = 1e-7  # added to a divisor


@dataclass(frozen=True)
class Matches:
    """K pairs of a query and a target over all layers, as four index vectors of length K.

    `target` indexes the targets of the whole batch, image after image.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


def giou_loss(boxes_cxcywh: Tensor, others_cxcywh: Tensor) -> Tensor:
    """Return 1 - GIoU (arXiv 1902.09630) of the boxes at the same index of two tensors (... x 4), which are broadcast.

    torchvision's `generalized_box_iou_loss` gives the same numbers, but its masks make the CPU wait for a GPU.
    """
    (first, last), (other_first, other_last) = _corners(boxes_cxcywh), _corners(others_cxcywh)
    shared_wh = torch.minimum(last, other_last) - torch.maximum(first, other_first)
    hull_wh = torch.maximum(last, other_last) - torch.minimum(first, other_first)
    intersection = _area(shared_wh).masked_fill((shared_wh <= 0).any(-1), 0)
    union = _area(last - first) + _area(other_last - other_first) - intersection
    hull = _area(hull_wh)
    return 1 - (intersection / (union + LEAST_AREA) - (hull - union) / (hull + LEAST_AREA))


def _corners(boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last corner (xy, ... x 2) of boxes (... x 4)."""
    centres, sides = boxes_cxcywh.split(2, dim=-1)
    half = 0.5 * sides
    return centres - half, centres + half


def _area(sides_wh: Tensor) -> Tensor:
    width, height = sides_wh.unbind(-1)
    return width * height


@dataclass(frozen=True)
class HungarianMatcher:
    """Hungarian matcher with weights for the focal class cost, L1 and GIoU of the boxes.

    `alpha` and `gamma` are those of the focal loss (arXiv 1708.02002).
    """

    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, targets: list[dict[str, Tensor]]) -> Matches:
        """Match each target to one query in every layer, with minimum total cost.

        Args:
            logits: L x B x Q x C.
            boxes_cxcywh: L x B x Q x 4.
            targets: a dict for each image with `labels` (N) and `boxes` (N x 4 cxcywh).
        """
        counts = [len(target["labels"]) for target in targets]
        found: list[tuple[int, int, int, int]] = []
        if sum(counts):
            costs = self._costs(at_least_float32(logits), at_least_float32(boxes_cxcywh), targets).cpu().numpy()
            offsets = [sum(counts[:image]) for image in range(len(counts))]
            for layer, layer_costs in enumerate(costs):
                for image, (count, offset) in enumerate(zip(counts, offsets, strict=True)):
                    queries, columns = linear_sum_assignment(layer_costs[image, :, :count])
                    found += [(layer, image, q, offset + c) for q, c in zip(queries, columns, strict=True)]
        return Matches(*numbers_on(logits.device, found, torch.int64).reshape(-1, 4).unbind(1))

    def _costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the costs, L x B x Q x (largest target count); columns beyond an image's count are not used."""
        index = _targets_of_columns([len(target["labels"]) for target in targets], logits.device)
        labels, target_boxes = (torch.cat([target[name] for target in targets])[index] for name in ("labels", "boxes"))
        # The change of a query's focal loss if this class becomes its target.
        positive = self.alpha * (1 - logits.sigmoid()) ** self.gamma * -torch.nn.functional.logsigmoid(logits)
        negative = (1 - self.alpha) * logits.sigmoid() ** self.gamma * -torch.nn.functional.logsigmoid(-logits)
        classes = labels[None, :, None, :].expand(*logits.shape[:3], -1)
        class_cost = (positive - negative).gather(3, classes)

        queries = boxes.unsqueeze(3)
        columns = target_boxes[None, :, None]
        bbox_cost = (queries - columns).abs().sum(-1)
        giou_cost = giou_loss(queries, columns)
        cost = self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost
        # The assignment rejects NaN; the training loop reports losses that are not finite.
        return cost.nan_to_num(nan=UNMATCHABLE_COST, posinf=UNMATCHABLE_COST, neginf=UNMATCHABLE_COST)


def _targets_of_columns(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the target of each column of each image (B x largest count), any target where an image has no more."""
    most, last = max(counts), sum(counts) - 1
    ends = accumulate(counts)
    rows = [[min(end - count + place, last) for place in range(most)] for end, count in zip(ends, counts, strict=True)]
    return numbers_on(device, rows)
