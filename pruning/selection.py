"""Turn scores into kept sets by forward selection, backward elimination, or scoring all channels once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.prunable import PrunableModule
from pruning.kept_channels import Kept, add, all_kept, missing, none_kept
from pruning.scores import Ranking

DIRECTIONS = ("backward", "forward", "once")


class Order:
    """Channels of a module sorted from best to worst, by part and head; a prefix is the kept set of a width."""

    def __init__(self, ranked: dict[str, Tensor]) -> None:
        """`ranked`: for each part, nheads x head width absolute channel indices, best first."""
        self._ranked = ranked

    def kept(self, width: int) -> Kept:
        """Return the kept set of `width` channels, equally many from each head."""
        return {
            part: ranked[:, : width // len(ranked)].flatten().sort().values for part, ranked in self._ranked.items()
        }

    @classmethod
    def natural(cls, module: PrunableModule) -> Order:
        """Return the channels in index order, for reconstructions that give every channel new weights."""
        return cls({part: torch.arange(module.width).view(module.nheads, -1) for part in module.parts})


def order_channels(
    module: PrunableModule, ranking: Ranking, direction: str, unit: int, share_sets: bool, max_steps: int = 32
) -> Order:
    """Rank all channels of a module.

    Args:
        direction: `backward` removes the worst channels step by step, `forward` adds the best to an empty module; both
            score again before each step. `once` scores the whole module.
        unit: least channels of a step, over all heads; steps are larger if `max_steps` would be exceeded.
        share_sets: whether all parts share one order.
    """
    groups = [module.parts] if share_sets else [(part,) for part in module.parts]
    if direction == "once":
        step = module.width
    else:
        step = max(unit, -(-module.width // (max_steps * module.nheads)) * module.nheads)
    walk = _forward if direction == "forward" else _backward
    ranked: dict[str, Tensor] = {}
    for joined in groups:
        order = walk(module, ranking, joined, step // module.nheads)
        ranked.update(dict.fromkeys(joined, order))
    return Order(ranked)


def _backward(module: PrunableModule, ranking: Ranking, joined: Sequence[str], per_head: int) -> Tensor:
    kept = all_kept(module)
    tail: list[Tensor] = []
    while len(kept[joined[0]]):
        candidates = kept[joined[0]]
        heads = _sorted_heads(module, candidates, ranking(module, joined, kept, candidates))
        leaving = heads[:, -per_head:]
        tail.insert(0, leaving)
        stay = ~torch.isin(candidates, leaving.flatten())
        kept = {part: channels[stay] if part in joined else channels for part, channels in kept.items()}
    return torch.cat(tail, 1)


def _forward(module: PrunableModule, ranking: Ranking, joined: Sequence[str], per_head: int) -> Tensor:
    whole, empty, front = all_kept(module), none_kept(module), []
    kept = {part: empty[part] if part in joined else whole[part] for part in whole}
    while len(kept[joined[0]]) < module.width:
        candidates = missing(module, {part: kept[part] for part in joined})
        heads = _sorted_heads(module, candidates, ranking(module, joined, kept, candidates))
        front.append(heads[:, :per_head])
        kept = {**kept, **add({part: kept[part] for part in joined}, front[-1].flatten())}
    return torch.cat(front, 1)


def _sorted_heads(module: PrunableModule, candidates: Tensor, scores: Tensor) -> Tensor:
    """Sort the ascending candidates of each head, equally many, by score (nheads x candidates of a head)."""
    of_heads, scores = candidates.view(module.nheads, -1), scores.view(module.nheads, -1)
    return of_heads.gather(1, scores.argsort(dim=1, stable=True))


def draw_candidates(module: PrunableModule, kept: Kept, count: int, unit: int, generator: torch.Generator) -> Tensor:
    """Draw random channels that are not kept, in ascending order.

    Draws at most `count`, spread evenly over the heads of an attention, but at least one unit of each head.

    Args:
        unit: channels that the step adds, over all heads.
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


def best_of_each_head(module: PrunableModule, candidates: Tensor, scores: Tensor, unit: int) -> Tensor:
    """Return the `unit` channels with the lowest scores, equally many from each head (or all if there are fewer)."""
    head_width = module.width // module.nheads
    best = []
    for head in range(module.nheads):
        of_head = (candidates // head_width == head).nonzero().flatten()
        order = scores[of_head].argsort(stable=True)[: unit // module.nheads]
        best.append(candidates[of_head[order]])
    return torch.cat(best).sort().values
