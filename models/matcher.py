"""Hungarian matching between queries and targets, for all decoder layers at once (DETR, arXiv 2005.12872, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou_loss

from models.layers import at_least_float32

UNMATCHABLE_COST = 1e6


@dataclass(frozen=True)
class Matches:
    """K pairs of a query and a target over all layers, as five index vectors of length K.

    `target` counts through the targets of the whole batch, image after image.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


@dataclass(frozen=True)
class HungarianMatcher:
    """Weights of the matching cost: focal class cost, L1 and GIoU of the boxes.

    `alpha` and `gamma` are the focal loss's (arXiv 1708.02002).
    """

    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, targets: list[dict[str, Tensor]]) -> Matches:
        """Match each target to one query in every layer, at the least total cost.

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
        return Matches(*torch.tensor(found, dtype=torch.int64, device=logits.device).reshape(-1, 4).unbind(1))

    def _costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """L x B x Q x (largest target count); columns beyond an image's count are never read."""
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
        target_boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
        # What the focal loss of a query would change by if this class became its target.
        positive = self.alpha * (1 - logits.sigmoid()) ** self.gamma * -torch.nn.functional.logsigmoid(logits)
        negative = (1 - self.alpha) * logits.sigmoid() ** self.gamma * -torch.nn.functional.logsigmoid(-logits)
        index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
        class_cost = (positive - negative).gather(3, index)

        queries = boxes.unsqueeze(3)
        columns = target_boxes[None, :, None]
        bbox_cost = (queries - columns).abs().sum(-1)
        shape = (*bbox_cost.shape, 4)
        giou_cost = generalized_box_iou_loss(
            box_convert(queries, "cxcywh", "xyxy").expand(shape), box_convert(columns, "cxcywh", "xyxy").expand(shape)
        )
        cost = self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost
        # The assignment refuses NaN; a loss that is not finite is reported by the training loop, with its parts.
        return cost.nan_to_num(nan=UNMATCHABLE_COST, posinf=UNMATCHABLE_COST, neginf=UNMATCHABLE_COST)
