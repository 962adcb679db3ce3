"""Distillation of the unpruned detector into the pruned one (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.criterion import layer_suffix, stacked_layers, weighted_sum
from models.denoising_queries import DenoisingSettings, ExtraQueries, Noise, draw_noise
from models.detector import Detector
from models.layers import at_least_float32, weights_converted
from models.matcher import giou_loss
from models.padding import PaddedImages
from util import distributed

# Queries of which student and teacher are compared, and the part of the losses' names that says so.
QUERIES = {"matching": "", "denoising": "denoising_", "anchors": "anchors_", "targets": "targets_"}
DISTANCES = ("logits", "bbox", "giou")
LEAST_SIDE = 1 / 32  # of the random anchors, in image sides

Answers = tuple[Tensor, Tensor]  # class logits (L x B x Q x C) or probabilities, and boxes cxcywh (L x B x Q x 4)


@dataclass(frozen=True)
class Lesson:
    """The teacher's outputs: L layers of the student, B images, Q matching queries, C classes, S feature pixels.

    Attributes:
        probabilities: L x B x Q x C.
        boxes_cxcywh: L x B x Q x 4 in [0, 1].
        memory: B x S x D, the encoder's output.
        pixels: B x S, 1 on image pixels and 0 on padding.
        extra: probabilities and boxes of other kinds of queries; denoising queries without padding, as L x 1 x T.
        noise: the noise of the denoising queries, or None.
    """

    probabilities: Tensor
    boxes_cxcywh: Tensor
    memory: Tensor
    pixels: Tensor
    extra: Mapping[str, Answers] = field(default_factory=dict)
    noise: Noise | None = None


class Distillation:
    """Losses between a student's and its teacher's queries and encoder outputs on the same images.

    Four kinds of queries can be compared: the matching ones; denoising queries, where both get the same noised targets;
    queries at random anchors (the general sampling of KD-DETR, arXiv 2211.08071, with the content of matching queries);
    and queries at the boxes of the targets (as CLoCKDistill, arXiv 2502.10683, makes them, but without their labels).

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
        kinds: kinds of queries to compare, of `QUERIES`.
        noise: of the denoising queries; None without them.
        student: what the frozen first layers of its backbone share with the teacher's is computed once; see `begin`.

    Attributes:
        shared_layers: number of these layers.
    """

    def __init__(
        self,
        teacher: Detector,
        weights: dict[str, float],
        num_layers: int | None = None,
        queries: Tensor | None = None,
        kinds: Sequence[str] = ("matching",),
        noise: DenoisingSettings | None = None,
        student: Detector | None = None,
    ) -> None:
        self.shared_layers = 0
        if student is not None and student.padding_rule == teacher.padding_rule:
            self.shared_layers = student.backbone[0].layers_shared_with(teacher.backbone[0])
        self.teacher = teacher.eval().requires_grad_(False)
        self._converted: dict[torch.dtype, Detector] = {}
        last = len(teacher.widths.decoder) - 1
        num_layers = num_layers or last + 1
        self.queries = None if queries is None else queries.to(next(teacher.parameters()).device)
        self.taught_layers = [*range(num_layers - 1), last]
        self.suffixes = [layer_suffix(layer, num_layers) for layer in range(num_layers)]
        self.kinds, self.noise = tuple(kinds), noise
        self.weight_dict = {
            name.replace("distill_", f"distill_{QUERIES[kind]}") + suffix: weight
            for name, weight in weights.items()
            if name != "loss_distill_memory"
            for kind in self.kinds
            for suffix in self.suffixes
        }
        self.weight_dict["loss_distill_memory"] = weights["loss_distill_memory"]

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

    def draw(self, targets: list[dict[str, Tensor]]) -> ExtraQueries:
        """Draw the queries of a batch besides the matching ones, for the student and for `teach`."""
        anchors = {}
        if "anchors" in self.kinds:
            anchors["anchors"] = _random_anchors(len(targets), self.teacher.num_queries, targets[0]["boxes"])
        if "targets" in self.kinds:
            most = max(1, *(len(target["boxes"]) for target in targets))
            anchors["targets"] = _random_anchors(len(targets), most, targets[0]["boxes"])
            for row, target in zip(anchors["targets"], targets, strict=True):
                row[: len(target["boxes"])] = target["boxes"]
        return ExtraQueries(draw_noise(targets, self.teacher.num_classes, self.noise), anchors)

    @torch.no_grad()
    def begin(self, images: list[Tensor]) -> list[Tensor] | PaddedImages:
        """Pad images (each 3 x H x W) as in training, and run the layers that student and teacher share on them."""
        if not self.shared_layers:
            return images
        padded = self.teacher.pad(images)
        return padded._replace(begun=self._runner().backbone[0].run(padded.batch, self.shared_layers))

    @torch.no_grad()
    def teach(self, images: list[Tensor] | Tensor | PaddedImages, queries: ExtraQueries | None = None) -> Lesson:
        """Run the teacher on the student's images, a list of 3 x H x W or a B x 3 x H x W, and its extra queries.

        A list is padded as in training, like the student's, so that both have the same feature pixels.
        """
        if isinstance(images, list):
            images = self.teacher.pad(images)
        noise = queries.noise if queries is not None and "denoising" in self.kinds else None
        if queries is not None:
            queries = replace(queries, noise=noise, content_queries=self.queries)
        teacher = self._runner()
        state = teacher.run_steps(teacher.prepare(images, queries))
        outputs = teacher.outputs(state)
        found = {
            kind: (self._teaching(logits).sigmoid(), self._teaching(boxes))
            for kind, (logits, boxes) in self._answers(outputs, noise).items()
        }
        probabilities, boxes = (
            layers if self.queries is None else layers[:, :, self.queries] for layers in found.pop("matching")
        )
        return Lesson(probabilities, boxes, at_least_float32(state.memory), state.pixels.float(), found, noise)

    def _runner(self) -> Detector:
        """Return the teacher; under autocast a copy of it whose weights need not be converted again in each step."""
        device_type = self.teacher.refpoint_embed.weight.device.type
        if not torch.is_autocast_enabled(device_type):
            return self.teacher
        dtype = torch.get_autocast_dtype(device_type)
        if dtype not in self._converted:
            self._converted = {dtype: weights_converted(self.teacher, dtype)}
        return self._converted[dtype]

    def free_converted(self) -> None:
        """Free the copy of the teacher with converted weights; the next batch under autocast makes one again."""
        self._converted = {}

    def _teaching(self, layers: Tensor) -> Tensor:
        """Return those of the teacher's layers (L x ...) that the student's learn from.

        Indexing with a list would make the CPU wait for a GPU.
        """
        return torch.stack([layers[layer] for layer in self.taught_layers])

    def _answers(self, outputs: dict, noise: Noise | None) -> dict[str, Answers]:
        """Return logits and boxes of the matching queries and of the extra ones that are compared."""
        found = {"matching": stacked_layers(outputs)}
        if noise is not None and "denoising" in self.kinds:
            place = (slice(None), noise.image, noise.slot)  # without padding
            of_noise = outputs["denoising"]
            found["denoising"] = (of_noise["pred_logits"][place][:, None], of_noise["pred_boxes"][place][:, None])
        kinds = [kind for kind in ("anchors", "targets") if kind in self.kinds]
        for kind, answers in zip(kinds, outputs.get("anchors", ()), strict=False):
            found[kind] = (answers["pred_logits"], answers["pred_boxes"])
        return {kind: (at_least_float32(logits), at_least_float32(boxes)) for kind, (logits, boxes) in found.items()}

    def __call__(self, outputs: dict, lesson: Lesson) -> dict[str, Tensor]:
        """Return all losses by name, unweighted: `loss_distill_memory` and, with the suffix `_i` for each layer but the
        last, `loss_distill_logits`, `loss_distill_bbox` and `loss_distill_giou`; those of other queries than the
        matching ones are named `loss_distill_denoising_logits` and so on.

        Args:
            outputs: the student's outputs in training mode; see `Detector.forward`.
            lesson: the teacher's outputs for the same images.
        """
        answers = self._answers(outputs, lesson.noise)
        taught = {"matching": (lesson.probabilities, lesson.boxes_cxcywh), **lesson.extra}
        zeros = lesson.probabilities.new_zeros(len(self.suffixes))
        totals = {
            f"{kind} {layer}": total
            for kind in self.kinds
            for layer, total in enumerate(_confidence(taught[kind][0]).sum((1, 2)) if kind in taught else zeros)
        }
        # Gradients are averaged over the processes, so each process divides by the mean total; the total of all is at
        # least 1.
        totals = distributed.average({**totals, "pixels": lesson.pixels.sum()})
        losses = {}
        least = 1 / distributed.world_size()
        for kind in self.kinds:
            total = torch.stack([totals[f"{kind} {layer}"] for layer in range(len(self.suffixes))]).clamp(min=least)
            sums = _distances(answers[kind], taught[kind]) if kind in taught else dict.fromkeys(DISTANCES, zeros)
            for name, values in sums.items():
                for suffix, value in zip(self.suffixes, values / total, strict=True):
                    losses[f"loss_distill_{QUERIES[kind]}{name}{suffix}"] = value
        distance = (_normalised(outputs["memory"]) - _normalised(lesson.memory)).square().mean(-1)
        losses["loss_distill_memory"] = (distance * lesson.pixels).sum() / totals["pixels"]
        return losses

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the scalar that training adds to the losses against the targets."""
        return weighted_sum(losses, self.weight_dict)


def _random_anchors(images: int, count: int, like: Tensor) -> Tensor:
    """Return random boxes, images x count x 4 cxcywh: centres anywhere, sides from `LEAST_SIDE` to 1, log-uniform."""
    random = torch.rand(images, count, 4, dtype=like.dtype, device=like.device)
    return torch.cat((random[..., :2], LEAST_SIDE ** random[..., 2:]), dim=-1)


def _confidence(probabilities: Tensor) -> Tensor:
    """Return the weight of each query, L x B x Q: the square of the teacher's highest class probability."""
    return probabilities.amax(-1).square()


def _distances(student: Answers, teacher: Answers) -> dict[str, Tensor]:
    """Return the sum over queries of each loss, for each layer (L)."""
    (logits, boxes), (probabilities, taught_boxes) = student, teacher
    weights = _confidence(probabilities)
    return {
        "logits": _quality_focal(logits, probabilities).sum((1, 2, 3)),
        "bbox": (weights * (boxes - taught_boxes).abs().sum(-1)).sum((1, 2)),
        "giou": (weights * giou_loss(boxes, taught_boxes)).sum((1, 2)),
    }


def _quality_focal(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Compute the quality focal loss (arXiv 2006.04388, equation 3, beta = 2) against soft targets."""
    entropy = F.binary_cross_entropy_with_logits(logits, probabilities, reduction="none")
    return (probabilities - logits.sigmoid()).square() * entropy


def _normalised(memory: Tensor) -> Tensor:
    """Normalise features (B x S x D) to mean 0 and variance 1 over the channels of each pixel."""
    return F.layer_norm(at_least_float32(memory), memory.shape[-1:])
