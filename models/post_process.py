"""Convert a detector's outputs to detections in pixels."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

from models.layers import at_least_float32


class PostProcess:
    """Select the `num_select` pairs of query and class with the highest scores in each image."""

    def __init__(self, num_select: int) -> None:
        self.num_select = num_select

    @torch.no_grad()
    def __call__(self, outputs: dict, sizes_hw: Tensor) -> list[dict[str, Tensor]]:
        """Return the detections of each image, sorted by descending score.

        Args:
            outputs: `pred_logits` B x Q x C and `pred_boxes` B x Q x 4 (cxcywh in [0, 1]).
            sizes_hw: B x 2, height and width to scale the boxes to.

        Returns:
            For each image `scores` (K), `labels` (K, category ids) and `boxes` (K x 4, absolute xyxy), with
            K = min(num_select, Q * C).
        """
        scores, labels, boxes = self.select(outputs["pred_logits"], outputs["pred_boxes"])
        height, width = sizes_hw.to(boxes).unbind(1)
        boxes = boxes * torch.stack((width, height, width, height), dim=1)[:, None]
        return [{"scores": s, "labels": label, "boxes": b} for s, label, b in zip(scores, labels, boxes, strict=True)]

    def select(self, logits: Tensor, boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (B x K), labels (B x K) and boxes (B x K x 4 xyxy, in the boxes' unit) by descending score.

        Args:
            logits: B x Q x C.
            boxes_cxcywh: B x Q x 4.
        """
        scores = at_least_float32(logits).sigmoid()
        num_queries, num_classes = scores.shape[1:]
        scores, index = scores.flatten(1).topk(min(self.num_select, num_queries * num_classes), dim=1)
        boxes = box_convert(at_least_float32(boxes_cxcywh), "cxcywh", "xyxy")
        boxes = boxes.gather(1, (index // num_classes).unsqueeze(-1).expand(-1, -1, 4))
        return scores, index % num_classes, boxes
