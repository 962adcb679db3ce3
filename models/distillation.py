"""Distillation of the unpruned detector into the pruned one (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.criterion import layer_suffix, stacked_layers, weighted_sum
from models.detector import Detector
from models.layers import at_least_float32
from models.matcher import giou_loss
from models.padding import PaddedImages
from util import distributed


@dataclass(frozen=True)
class Lesson:
    """The teacher's outputs: L layers of the student, B images, Q matching queries, C classes, S feature pixels.

    Attributes:
        probabilities: L x B x Q x C.
        boxes_cxcywh: L x B x Q x 4 in [0, 1].
        memory: B x S x D, the encoder's output.
        pixels: B x S, 1 on image pixels and 0 on padding.
    """

    probabilities: Tensor
    boxes_cxcywh: Tensor
    memory: Tensor
    pixels: Tensor


class Distillation:
    """Losses between a student's and its teacher's matching queries and encoder outputs on the same images.

    A student pruned from its teacher has the same queries, so query i learns from query i, without matching. Most
    queries are background to the teacher: their boxes are meaningless, and their logits must not dominate those of the
    few queries with an object. So boxes are weighted by the square of the teacher's confidence (its highest class
    probability in that layer), and logits by the square of the difference in probability (the quality focal loss of
    arXiv 2006.04388, with soft targets), which is almost 0 where both predict background. Both are summed and divided
    by the sum of the squared confidences. The memory's loss is the mean squared difference of pixel features, each
    normalised over its channels.

    A student may have fewer decoder layers: its last layer learns from the teacher's last, each earlier one from the
    teacher's layer of the same index. It may have fewer queries, each of which learns from the teacher's query that it
    was; the teacher runs with all of its own.

    Args:
        teacher: a detector with the student's classes, queries, channels and encoder layers, and at least as many
            decoder layers, on the student's device; it is set to eval mode without gradients.
        weights: weights of `loss_distill_logits`, `loss_distill_bbox`, `loss_distill_giou` and `loss_distill_memory`.
        num_layers: the student's decoder layers, by default as many as the teacher's.
        queries: the teacher's matching query of each of the student's; None if they have the same.
    """

    def __init__(
        self,
        teacher: Detector,
        weights: dict[str, float],
        num_layers: int | None = None,
        queries: Tensor | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        last = len(teacher.widths.decoder) - 1
        num_layers = num_layers or last + 1
        self.queries = slice(None) if queries is None else queries.to(next(teacher.parameters()).device)
        self.taught_layers = [*range(num_layers - 1), last]
        self.suffixes = [layer_suffix(layer, num_layers) for layer in range(num_layers)]
        self.weight_dict = {
            name + suffix: weight
            for name, weight in weights.items()
            for suffix in ([""] if name == "loss_distill_memory" else self.suffixes)
        }

    @property
    def remark(self) -> str | None:
        """Log line that says which layers are matched, if the teacher has more; else None."""
        fewer, layers = len(self.taught_layers), len(self.teacher.widths.decoder)
        if fewer == layers:
            return None
        return (
            f"--distill: the last of {fewer} decoder layers learns from the last of the teacher's {layers}, each "
            "earlier one from the teacher's layer of the same number"
        )

    @torch.no_grad()
    def teach(self, images: list[Tensor] | Tensor | PaddedImages) -> Lesson:
        """Run the teacher on the student's images, a list of 3 x H x W or a B x 3 x H x W.

        A list is padded as in training, like the student's, so that both have the same feature pixels.
        """
        if isinstance(images, list):
            images = self.teacher.pad(images)
        state = self.teacher.run_steps(self.teacher.prepare(images))
        taught = (layers[self.taught_layers] for layers in stacked_layers(self.teacher.outputs(state)))
        logits, boxes = (layers[:, :, self.queries] for layers in taught)
        return Lesson(logits.sigmoid(), boxes, at_least_float32(state.memory), state.pixels.float())

    def __call__(self, outputs: dict, lesson: Lesson) -> dict[str, Tensor]:
        """Return all losses by name, unweighted: `loss_distill_memory` and, with the suffix `_i` for each layer but the
        last, `loss_distill_logits`, `loss_distill_bbox` and `loss_distill_giou`.

        Args:
            outputs: the student's outputs in training mode; see `Detector.forward`.
            lesson: the teacher's outputs for the same images.
        """
        logits, boxes = stacked_layers(outputs)
        weights = lesson.probabilities.amax(-1).square()
        totals = {str(layer): total for layer, total in enumerate(weights.sum((1, 2)))}
        # Gradients are averaged over the processes, so each process divides by the mean total.
        totals = distributed.average({**totals, "pixels": lesson.pixels.sum()})
        pixels = totals.pop("pixels")
        per_layer = {
            "loss_distill_logits": _quality_focal(logits, lesson.probabilities).sum((1, 2, 3)),
            "loss_distill_bbox": (weights * (boxes - lesson.boxes_cxcywh).abs().sum(-1)).sum((1, 2)),
            "loss_distill_giou": (weights * giou_loss(boxes, lesson.boxes_cxcywh)).sum((1, 2)),
        }
        total = torch.stack([totals[str(layer)] for layer in range(len(totals))]).clamp(min=1)
        losses = {
            name + suffix: value
            for name, values in per_layer.items()
            for suffix, value in zip(self.suffixes, values / total, strict=True)
        }
        distance = (_normalised(outputs["memory"]) - _normalised(lesson.memory)).square().mean(-1)
        losses["loss_distill_memory"] = (distance * lesson.pixels).sum() / pixels
        return losses

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the scalar that training adds to the losses against the targets."""
        return weighted_sum(losses, self.weight_dict)


def _quality_focal(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Compute the quality focal loss (arXiv 2006.04388, equation 3, beta = 2) against soft targets."""
    entropy = F.binary_cross_entropy_with_logits(logits, probabilities, reduction="none")
    return (probabilities - logits.sigmoid()).square() * entropy


def _normalised(memory: Tensor) -> Tensor:
    """Normalise features (B x S x D) to mean 0 and variance 1 over the channels of each pixel."""
    return F.layer_norm(at_least_float32(memory), memory.shape[-1:])
