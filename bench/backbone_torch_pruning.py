"""Prune the backbone of a detector with Torch-Pruning (Fang et al., arXiv 2301.12900) to a budget of MACs.

Torch-Pruning gets the backbone alone. Its dependency graph, importance and ranking decide what to remove, and it
removes it. The pruned backbone goes back into a copy of the detector. Install it with `pip install '.[bench]'`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.batch_norms import norms_unfrozen
from bench.torch_pruning_baseline import import_torch_pruning, quietly
from models.backbone import Backbone
from models.detector import Detector
from pruning.cost import cost_of
from util.errors import UserError

COARSE_STEP = 0.1  # of the ratio
BISECTIONS = 10
CLOSE = 0.002  # relative difference from the budget at which the bisection ends
TOLERANCE = 0.02  # greatest relative difference from the budget


@dataclass(frozen=True)
class Setting:
    """How Torch-Pruning prunes.

    Attributes:
        importance: `magnitude` (MagnitudeImportance) or `taylor` (TaylorImportance).
        groups: `inner` prunes what this package prunes, the inner channels of residual blocks; `all` every group of
            channels but those that the transformer reads, so also the stem and the stream between blocks.
        ranking: `global` ranks the channels of all groups together, `uniform` removes the same share of each group.
    """

    importance: str
    groups: str
    ranking: str


class _Stages(nn.Module):
    """A backbone with the stages that the transformer reads as outputs."""

    def __init__(self, backbone: Backbone, stages: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.stages = stages

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.backbone(images, self.stages)


def prune_backbone(
    model: Detector, setting: Setting, keep: float, image_size_hw: tuple[int, int], gradients: Mapping[str, Tensor]
) -> Detector:
    """Return a copy of a detector whose backbone Torch-Pruning has pruned.

    The channel share that it is asked to remove is the first, in steps of `COARSE_STEP`, at which the MACs fall below
    the budget, refined by bisection. Bisection alone could miss it: Torch-Pruning leaves a group whole if it would lose
    all of its channels, so that MACs rise again at high ratios.

    Args:
        keep: share of the whole detector's MACs to keep.
        image_size_hw: image size for MACs, in pixels.
        gradients: gradients of the loss by parameter name, see `torch_pruning_baseline.loss_gradients`; `magnitude`
            uses none.

    Raises:
        UserError: torch-pruning is not installed, or no ratio comes within `TOLERANCE` of the budget.
    """
    budget = keep * cost_of(model, image_size_hw).detector_gmacs
    best, error = model, abs(1 / keep - 1)
    low, high, ratio = 0.0, 1.0, COARSE_STEP
    for _ in range(round(1 / COARSE_STEP) + BISECTIONS):
        slim = _prune(model, setting, ratio, image_size_hw, gradients)
        difference = cost_of(slim, image_size_hw).detector_gmacs / budget - 1
        if abs(difference) < error:
            best, error = slim, abs(difference)
        if error < CLOSE:
            break
        low, high = (ratio, high) if difference > 0 else (low, ratio)
        ratio = min(low + COARSE_STEP, (low + high) / 2)
    if error > TOLERANCE:
        raise UserError(
            f"--keep {keep}: Torch-Pruning ({setting.importance}, {setting.groups}, {setting.ranking}) came within "
            f"{100 * error:.1f} % of these MACs, expected within {100 * TOLERANCE:.0f} %"
        )
    return best


def _prune(
    model: Detector, setting: Setting, ratio: float, image_size_hw: tuple[int, int], gradients: Mapping[str, Tensor]
) -> Detector:
    """Return a copy of a detector after one run of Torch-Pruning's pruner over its backbone."""
    tp = import_torch_pruning()
    importances = {"magnitude": tp.importance.MagnitudeImportance, "taylor": tp.importance.TaylorImportance}
    slim = copy.deepcopy(model).eval()
    backbone = slim.backbone[0]
    needs_grad = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
    with norms_unfrozen(backbone):
        for name, parameter in slim.named_parameters():
            parameter.grad = gradients.get(name)
        backbone.requires_grad_(True)  # it follows the graph of autograd
        image = torch.randn(1, 3, *image_size_hw, generator=torch.Generator().manual_seed(0))
        with torch.enable_grad(), quietly():
            pruner = tp.pruner.BasePruner(
                _Stages(backbone, slim.stages),
                image.to(next(model.parameters()).device),
                importance=importances[setting.importance](),
                pruning_ratio=ratio,
                global_pruning=setting.ranking == "global",
                ignored_layers=_ignored(backbone, slim.stages, setting.groups),
            )
            pruner.step()
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(needs_grad[name])
    slim.zero_grad(set_to_none=True)
    return slim


def _ignored(backbone: Backbone, stages: Sequence[str], groups: str) -> list[nn.Module]:
    """Return the convolutions whose outputs must stay."""
    inner = {
        block.get_submodule(f"conv{number}")
        for block in backbone.residual_blocks().values()
        for number in range(1, len(block.parts) + 1)
    }
    outer = {
        name: module
        for name, module in backbone.body.named_modules()
        if isinstance(module, nn.Conv2d) and module not in inner
    }
    read = tuple(f"{stage}." for stage in stages)
    return [module for name, module in outer.items() if groups == "inner" or name.startswith(read)]
