"""Rankings: how good is it to keep a channel. The lower a score, the better.

A ranking is called with the module under search, its kept set and candidate channels, and gives one score each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pruning.features import StateCache, repeat_batch, split_outputs
from pruning.gates import Gated, set_candidate_gates, set_gate
from pruning.kept import Kept, missing
from util import distributed


class Ranking(Protocol):
    """What a search asks of a ranking."""

    def __call__(self, module: Gated, kept: Kept, candidates: Tensor) -> Tensor:
        """One float64 score on the CPU for each of the candidate channels, lower is better."""
        ...


class ExactLoss:
    """The paper's score: the loss of one batch with the candidate's channel added to those kept.

    The loss is the eval-mode weighted sum without denoising (Huang et al. 2025; greedy forward selection of Ye et al.,
    arXiv 2003.01794), computed from the cached state in front of the module. Several candidates share one forward.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, cache: StateCache, *, device: torch.device, images_at_once: int
    ) -> None:
        """Score on the first batch of `cache`, as many candidates in a forward as `images_at_once` images allow."""
        self._criterion = criterion
        self._cache = cache
        self._device = device
        self._targets = [{k: v.to(device) for k, v in target.items()} for target in cache.targets[0]]
        self._at_once = max(1, images_at_once // len(self._targets))

    @torch.no_grad()
    def __call__(self, module: Gated, kept: Kept, candidates: Tensor) -> Tensor:
        """See `Ranking`. With several processes each scores its share, and all get every score."""
        state = self._cache.state(0).to(self._device)
        images, world = len(self._targets), distributed.world_size()
        share = -(-len(candidates) // world)
        mine = torch.arange(distributed.rank() * share, (distributed.rank() + 1) * share).clamp(max=len(candidates) - 1)
        losses = []
        for group in candidates[mine].split(self._at_once):
            set_candidate_gates(module, kept, [channel[None] for channel in group], images, self._device)
            outputs = self._cache.predict(repeat_batch(state, len(group)))
            losses += [self._loss(part) for part in split_outputs(outputs, len(group))]
        set_gate(module, kept, self._device)
        scores = torch.stack(losses).double().cpu()
        return torch.cat(distributed.gather_objects(scores))[: len(candidates)]

    def _loss(self, outputs: dict) -> Tensor:
        return self._criterion.weighted_sum(self._criterion(outputs, self._targets))


def draw_candidates(module: Gated, kept: Kept, count: int, unit: int, generator: torch.Generator) -> Tensor:
    """Random channels that are not kept yet, in ascending order.

    At most `count` in all, spread evenly over the heads of an attention, and enough of each head for one unit.

    Args:
        unit: channels that the step adds, in all heads together.
    """
    free = missing(module, kept)
    head_width = module.width // module.nheads
    drawn = []
    for head in range(module.nheads):
        of_head = free[free // head_width == head]
        fair = count // module.nheads + (head < count % module.nheads)
        chosen = torch.randperm(len(of_head), generator=generator)[: max(fair, unit // module.nheads)]
        drawn.append(of_head[chosen])
    return torch.cat(drawn).sort().values


def best_of_each_head(module: Gated, candidates: Tensor, scores: Tensor, unit: int) -> Tensor:
    """The `unit` channels with the lowest scores, equally many from each head; all that are there if fewer."""
    head_width = module.width // module.nheads
    best = []
    for head in range(module.nheads):
        of_head = (candidates // head_width == head).nonzero().flatten()
        order = scores[of_head].argsort(stable=True)[: unit // module.nheads]
        best.append(candidates[of_head[order]])
    return torch.cat(best).sort().values
