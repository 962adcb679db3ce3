"""Losses of DN-DETR (arXiv 2203.01305, section 4), batched over decoder layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from models.denoising_queries import slot_indices
from models.layers import at_least_float32, numbers_on
from models.matcher import HungarianMatcher, Matches, giou_loss
from util import distributed

LOSSES = ("loss_ce", "loss_bbox", "loss_giou")


def layer_suffix(layer: int, num_layers: int) -> str:
    """Return the suffix of a decoder layer's loss names: empty for the last layer, else `_` and its index."""
    return "" if layer == num_layers - 1 else f"_{layer}"


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Return the sum of the losses that have a weight."""
    values = torch.stack([losses[name] for name in weights])
    return (values * numbers_on(values.device, [*weights.values()], values.dtype)).sum()


def stacked_layers(outputs: dict) -> tuple[Tensor, Tensor]:
    """Return the logits (L x B x Q x C) and boxes (L x B x Q x 4) of all layers, in float32 or wider."""
    layers = [*outputs["aux_outputs"], outputs]
    logits, boxes = (torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes"))
    return at_least_float32(logits), at_least_float32(boxes)


class Criterion(nn.Module):
    """Focal, L1 and GIoU losses on matched queries and on denoising queries, for every decoder layer.

    Args:
        matcher: pairs queries with targets.
        num_layers: number of decoder layers.
        weights: weights of `loss_ce`, `loss_bbox` and `loss_giou` in the sum, also for denoising queries.
        focal_alpha: weight of positives in the focal loss; its gamma is 2.
        log_box_parts: also return `loss_xy` and `loss_hw`, the L1 loss split into centre and size, for logging only.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        num_layers: int,
        weights: dict[str, float],
        focal_alpha: float = 0.25,
        *,
        log_box_parts: bool = True,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_layers = num_layers
        self.focal_alpha = focal_alpha
        self._num_boxes: int | None = None
        self.log_box_parts = log_box_parts
        self.weight_dict = {
            f"{prefix}{name}{suffix}": weights[name]
            for prefix in ("", "tgt_")
            for name in LOSSES
            for suffix in (layer_suffix(layer, num_layers) for layer in range(num_layers))
        }

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the scalar that training minimises; the paper's search scores channels by it, too."""
        return weighted_sum(losses, self.weight_dict)

    @contextmanager
    def normalised_by(self, num_boxes: int) -> Iterator[None]:
        """Divide losses inside the context by `num_boxes` (at least 1), not by the mean box count of the processes.

        Use it for a part of a batch, or if processes do not compute losses equally often.
        """
        self._num_boxes = num_boxes
        try:
            yield
        finally:
            self._num_boxes = None

    def forward(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return all losses by name, unweighted.

        Args:
            outputs: a detector's outputs; see `Detector.forward`.
            targets: a dict for each image with `labels` (N) and `boxes` (N x 4 cxcywh in [0, 1]).

        Returns:
            `loss_ce`, `loss_bbox`, `loss_giou`, `loss_xy`, `loss_hw`, `cardinality_error` and, with the prefix `tgt_`,
            `loss_ce`, `loss_bbox`, `loss_giou`, `class_error` of the denoising queries (0 without them), with the
            suffix `_i` for each layer but the last; `class_error` of the last layer.
        """
        logits, boxes = stacked_layers(outputs)
        labels = torch.cat([target["labels"] for target in targets])
        target_boxes = torch.cat([target["boxes"] for target in targets])
        matches = self.matcher(logits, boxes, targets)
        num_boxes = self._mean_over_processes(len(labels), logits.device)

        classes = labels[matches.target]
        per_layer = {
            "loss_ce": self._focal(logits, matches, classes) / num_boxes.clamp(min=1),
            **self._box_losses(boxes, target_boxes[matches.target], matches, num_boxes.clamp(min=1)),
            "cardinality_error": self._cardinality_error(logits, targets),
        }
        per_layer |= self._denoising_losses(outputs.get("denoising"), targets, labels, target_boxes, num_boxes)
        losses = {
            name + layer_suffix(layer, self.num_layers): value
            for name, values in per_layer.items()
            for layer, value in enumerate(values)
        }
        losses["class_error"] = self._class_error(logits, matches, classes)[-1]
        return losses

    def _mean_over_processes(self, count: int, device: torch.device) -> Tensor:
        total = torch.full((), float(count if self._num_boxes is None else self._num_boxes), device=device)
        return distributed.average({"boxes": total})["boxes"] if self._num_boxes is None else total

    def _focal(self, logits: Tensor, matches: Matches, classes: Tensor) -> Tensor:
        """Sum the focal loss of each layer (L); logits are L x B x Q x C, unmatched queries are background."""
        onehot = torch.zeros_like(logits)
        onehot[matches.layer, matches.image, matches.query, classes] = 1
        return sigmoid_focal_loss(logits, onehot, self.focal_alpha, reduction="none").sum((1, 2, 3))

    def _box_losses(
        self, boxes: Tensor, matched_boxes: Tensor, matches: Matches, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Return L1 (with `log_box_parts` also split into centre and size) and GIoU losses of each layer (L)."""
        predicted = boxes[matches.layer, matches.image, matches.query]
        distance = (predicted - matched_boxes).abs()
        parts = {"loss_bbox": distance.sum(1), "loss_giou": giou_loss(predicted, matched_boxes)}
        if self.log_box_parts:
            parts |= {"loss_xy": distance[:, :2].sum(1).detach(), "loss_hw": distance[:, 2:].sum(1).detach()}
        zeros = boxes.new_zeros(len(boxes))
        return {name: zeros.index_add(0, matches.layer, part) / num_boxes for name, part in parts.items()}

    @staticmethod
    @torch.no_grad()
    def _cardinality_error(logits: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the mean over images of |queries whose top class is not the last - targets| of each layer (L)."""
        counts = numbers_on(logits.device, [len(target["labels"]) for target in targets])
        predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
        return (predicted - counts).abs().float().mean(-1)

    @staticmethod
    @torch.no_grad()
    def _class_error(logits: Tensor, matches: Matches, classes: Tensor) -> Tensor:
        """Return the percentage of matched queries with a wrong top class of each layer (L); 100 without targets."""
        correct = logits[matches.layer, matches.image, matches.query].argmax(-1) == classes
        zeros = logits.new_zeros(len(logits))
        right = zeros.index_add(0, matches.layer, correct.to(zeros.dtype))
        total = zeros.index_add(0, matches.layer, torch.ones_like(correct, dtype=zeros.dtype))
        return 100 - 100 * right / total.clamp(min=1)

    def _denoising_losses(
        self,
        denoising: dict | None,
        targets: list[dict[str, Tensor]],
        labels: Tensor,
        target_boxes: Tensor,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of denoising queries against their own targets, without matching."""
        names = (*LOSSES, "class_error")
        if denoising is None:
            zeros = torch.zeros(self.num_layers, device=num_boxes.device)
            return {f"tgt_{name}": zeros for name in names}
        logits, boxes = at_least_float32(denoising["pred_logits"]), at_least_float32(denoising["pred_boxes"])
        image, query, target = slot_indices(targets, denoising["layout"])
        layer = torch.arange(len(logits), device=logits.device).repeat_interleave(len(target))
        pairs = Matches(layer, *(index.repeat(len(logits)) for index in (image, query, target)))
        num_noised = (num_boxes * denoising["layout"].groups).clamp(min=1)

        # Padding slots of a group must not count as background, so the focal loss uses only real ones.
        real = logits[:, image, query]
        onehot = F.one_hot(labels[target], real.shape[-1]).to(real.dtype).expand_as(real)
        losses = {
            "loss_ce": sigmoid_focal_loss(real, onehot, self.focal_alpha, reduction="none").sum((1, 2)) / num_noised
        }
        losses |= self._box_losses(boxes, target_boxes[pairs.target], pairs, num_noised)
        losses["class_error"] = self._class_error(logits, pairs, labels[pairs.target])
        return {f"tgt_{name}": losses[name] for name in names}
