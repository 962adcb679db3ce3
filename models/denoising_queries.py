"""Denoising queries: noised copies of targets that the decoder learns to reconstruct (DN-DETR, arXiv 2203.01305)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from models.layers import inverse_sigmoid
from models.state import DenoisingQueries


@dataclass(frozen=True)
class DenoisingSettings:
    """Settings of the noise on targets.

    Attributes:
        groups: number of noised copies of each target (`--scalar`).
        label_noise: probability that a label becomes a random class.
        box_noise: maximum shift of a box centre in half box sizes, and maximum change of its size in box sizes.
    """

    groups: int = 5
    label_noise: float = 0.2
    box_noise: float = 0.4


@dataclass(frozen=True)
class Noise:
    """Drawn noise, from which a detector makes denoising queries; T noised targets.

    Attributes:
        labels: T class indices.
        boxes_cxcywh: T x 4 in [0, 1].
        image: T indices of images in the batch.
        slot: T indices of queries.
        num_images: images of the batch.
        layout: of the queries.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    image: Tensor
    slot: Tensor
    num_images: int
    layout: DenoisingQueries


@dataclass(frozen=True)
class ExtraQueries:
    """The queries of a batch besides the matching ones, so that two detectors can be given the same.

    Attributes:
        noise: from which denoising queries are made, or None.
        anchors_cxcywh: by kind, B x P x 4 in [0, 1]. The query at each anchor has the content of a matching query, and
            attends to the queries of its kind alone.
        content_queries: indices of the matching queries that give the contents, in turn; None for all.
    """

    noise: Noise | None
    anchors_cxcywh: Mapping[str, Tensor] = field(default_factory=dict)
    content_queries: Tensor | None = None


@dataclass(frozen=True)
class NoisedTargets:
    """Contents (B x P x D) and anchor logits (B x P x 4) of P denoising queries; zero in padding slots."""

    content: Tensor
    anchor_logits: Tensor
    layout: DenoisingQueries


def slot_indices(targets: list[dict[str, Tensor]], layout: DenoisingQueries) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, query and target indices (1-D) of all noised targets; targets are counted over the batch."""
    counts = [len(target["labels"]) for target in targets]
    slots_per_group = layout.num_queries // max(layout.groups, 1)
    # numpy, and one copy to the device: for arrays this small, the overhead of each operator dominates.
    target = np.arange(sum(counts))
    image = np.repeat(np.arange(len(counts)), counts)
    within = target - np.repeat(np.cumsum(counts) - counts, counts)
    slot = within + np.arange(layout.groups)[:, None] * slots_per_group
    indices = np.stack((np.tile(image, layout.groups), slot.reshape(-1), np.tile(target, layout.groups)))
    image_slot_target = torch.from_numpy(indices).to(targets[0]["labels"].device, non_blocking=True)
    return image_slot_target[0], image_slot_target[1], image_slot_target[2]


def add_noise(
    labels: Tensor, boxes_cxcywh: Tensor, num_classes: int, settings: DenoisingSettings
) -> tuple[Tensor, Tensor]:
    """Return noised labels (N) and boxes (N x 4, clipped to [0, 1]), drawn from torch's default generator."""
    flipped = torch.rand(labels.shape, device=labels.device) < settings.label_noise
    labels = torch.where(flipped, torch.randint_like(labels, num_classes), labels)
    reach = torch.cat((boxes_cxcywh[:, 2:] / 2, boxes_cxcywh[:, 2:]), dim=1)
    shift = (2 * torch.rand_like(boxes_cxcywh) - 1) * reach * settings.box_noise
    return labels, (boxes_cxcywh + shift).clamp(0, 1)


def draw_noise(targets: list[dict[str, Tensor]], num_classes: int, settings: DenoisingSettings | None) -> Noise | None:
    """Draw noised copies of a batch of targets, `settings.groups` of each; None if there are no targets."""
    most = max((len(target["labels"]) for target in targets), default=0)
    if settings is None or most == 0 or settings.groups == 0:
        return None
    layout = DenoisingQueries(most * settings.groups, settings.groups)
    image, slot, index = slot_indices(targets, layout)
    labels = torch.cat([target["labels"] for target in targets])[index]
    boxes = torch.cat([target["boxes"] for target in targets])[index]
    labels, boxes = add_noise(labels, boxes, num_classes, settings)
    return Noise(labels, boxes, image, slot, len(targets), layout)


def noised_queries(noise: Noise, label_enc: nn.Embedding) -> NoisedTargets:
    """Return the denoising queries of drawn noise.

    Each group holds a noised copy of each target of an image, padded to the largest target count of the batch. The
    content's last channel is the indicator, 1 for denoising queries.
    """
    encoded = label_enc(noise.labels)
    encoded = torch.cat((encoded, encoded.new_ones(len(noise.labels), 1)), dim=1)
    shape, place = (noise.num_images, noise.layout.num_queries), (noise.image, noise.slot)
    content = encoded.new_zeros(*shape, encoded.shape[1]).index_put(place, encoded)
    anchor_logits = noise.boxes_cxcywh.new_zeros(*shape, 4).index_put(place, inverse_sigmoid(noise.boxes_cxcywh))
    return NoisedTargets(content, anchor_logits, noise.layout)


def query_mask(layout: DenoisingQueries, num_matching: int, device: torch.device) -> Tensor:
    """Return a bool mask (Q x Q), True where a query may attend.

    A denoising query attends to its own group and to the matching queries, a shared anchor to its own group alone.
    """
    group = torch.arange(layout.num_queries, device=device) // max(1, layout.num_queries // max(1, layout.groups))
    of_anchors = [group.new_full((size,), layout.groups + index) for index, size in enumerate(layout.anchors)]
    group = torch.cat((group, *of_anchors, group.new_full((num_matching,), -1)))
    sees_matching = group < layout.groups
    return (group[:, None] == group[None, :]) | (sees_matching[:, None] & (group[None, :] == -1))
