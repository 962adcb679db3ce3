"""Denoising queries: noised copies of targets that the decoder learns to reconstruct (DN-DETR, arXiv 2203.01305)."""

from __future__ import annotations

from dataclasses import dataclass

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
class NoisedTargets:
    """Contents (B x P x D) and anchor logits (B x P x 4) of P denoising queries; zero in padding slots."""

    content: Tensor
    anchor_logits: Tensor
    layout: DenoisingQueries


def slot_indices(targets: list[dict[str, Tensor]], layout: DenoisingQueries) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, query and target indices (1-D) of all noised targets; targets are counted over the batch."""
    counts = [len(target["labels"]) for target in targets]
    device = targets[0]["labels"].device
    slots_per_group = layout.num_queries // max(layout.groups, 1)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    within = torch.cat([torch.arange(count) for count in counts])
    target = torch.arange(sum(counts))
    offsets = torch.arange(layout.groups).repeat_interleave(len(target)) * slots_per_group
    groups = layout.groups
    return (
        image.repeat(groups).to(device),
        (within.repeat(groups) + offsets).to(device),
        target.repeat(groups).to(device),
    )


def add_noise(
    labels: Tensor, boxes_cxcywh: Tensor, num_classes: int, settings: DenoisingSettings
) -> tuple[Tensor, Tensor]:
    """Return noised labels (N) and boxes (N x 4, clipped to [0, 1]), drawn from torch's default generator."""
    flipped = torch.rand(labels.shape, device=labels.device) < settings.label_noise
    labels = torch.where(flipped, torch.randint_like(labels, num_classes), labels)
    reach = torch.cat((boxes_cxcywh[:, 2:] / 2, boxes_cxcywh[:, 2:]), dim=1)
    shift = (2 * torch.rand_like(boxes_cxcywh) - 1) * reach * settings.box_noise
    return labels, (boxes_cxcywh + shift).clamp(0, 1)


def noised_queries(
    targets: list[dict[str, Tensor]], label_enc: nn.Embedding, num_classes: int, settings: DenoisingSettings
) -> NoisedTargets | None:
    """Return denoising queries for a batch of targets, or None if there are no targets.

    Each of the `settings.groups` groups holds a noised copy of each target of an image, padded to the largest target
    count of the batch. The content's last channel is the indicator, 1 for denoising queries.
    """
    most = max((len(target["labels"]) for target in targets), default=0)
    if most == 0 or settings.groups == 0:
        return None
    layout = DenoisingQueries(most * settings.groups, settings.groups)
    image, slot, index = slot_indices(targets, layout)
    labels = torch.cat([target["labels"] for target in targets])[index]
    boxes = torch.cat([target["boxes"] for target in targets])[index]
    labels, boxes = add_noise(labels, boxes, num_classes, settings)
    encoded = label_enc(labels)
    encoded = torch.cat((encoded, encoded.new_ones(len(labels), 1)), dim=1)
    shape = (len(targets), layout.num_queries)
    content = encoded.new_zeros(*shape, encoded.shape[1]).index_put((image, slot), encoded)
    anchor_logits = boxes.new_zeros(*shape, 4).index_put((image, slot), inverse_sigmoid(boxes))
    return NoisedTargets(content, anchor_logits, layout)


def query_mask(layout: DenoisingQueries, num_matching: int, device: torch.device) -> Tensor:
    """Return a bool mask (Q x Q), True where a query may attend: to matching queries and to its own group."""
    slots_per_group = layout.num_queries // layout.groups
    group = torch.arange(layout.num_queries, device=device) // slots_per_group
    group = torch.cat((group, group.new_full((num_matching,), -1)))
    return (group[:, None] == group[None, :]) | (group[None, :] == -1)
