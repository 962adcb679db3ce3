"""Re-estimate the statistics of a cut backbone's batch norms, the usual repair after pruning without training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.detector import Detector
from models.padding import group_by_size


@torch.no_grad()
def with_norms_reestimated(model: Detector, batches: Iterable[tuple[Sequence[Tensor], Any]]) -> Detector:
    """Return a copy of a detector with mean and variance of the backbone's batch norms from these images.

    Means and variances are those of each batch, as in training mode, averaged over the batches with equal weights. The
    backbone runs in training mode, so each norm's inputs are normalised by the batch's statistics too.

    Args:
        batches: (images, targets); images of different sizes become batches of equal sizes.
    """
    model = copy.deepcopy(model).eval()
    with norms_unfrozen(model.backbone[0]):
        norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for images, _ in batches:
            for group in group_by_size(images):
                model.feature_maps(group.batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return model


@contextmanager
def norms_unfrozen(module: nn.Module) -> Iterator[None]:
    """Replace each FrozenBatchNorm2d of `module` by a BatchNorm2d with the same outputs in eval mode.

    Afterwards they are frozen again, with the weights and channels that they then have.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, FrozenBatchNorm2d)]
    _replace(module, names, nn.BatchNorm2d)
    try:
        yield
    finally:
        _replace(module, names, FrozenBatchNorm2d)


def _replace(module: nn.Module, names: Sequence[str], kind: type[nn.Module]) -> None:
    for name in names:
        old = module.get_submodule(name)
        new = kind(len(old.running_mean), eps=old.eps).to(old.running_mean.device).eval()
        new.load_state_dict(old.state_dict(), strict=False)  # only one of the two counts batches
        module.set_submodule(name, new)
