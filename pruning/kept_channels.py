"""Kept sets: the channels of a module that pruning keeps.

A `Kept` maps a part to its sorted channel indices (int64, counted over the whole module, not within a head):
`{"query": ..., "value": ...}` for an attention, equally many in each head and in both parts, `{"hidden": ...}` for an
FFN, `{"value": ...}` for a deformable attention, which has no queries to cut; `{"inner": ...}` for a BasicBlock,
`{"inner1": ..., "inner2": ...}`, equally many, for a Bottleneck. The two sets of a module are independent by format;
`add` gives both the same channels. Empty sets remove the module: it then adds only a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from models.prunable import PrunableModule
from util.errors import UserError, shorten

Kept = Mapping[str, torch.Tensor]


def none_kept(module: PrunableModule) -> Kept:
    """Return the empty kept set, from which a search starts."""
    return {part: torch.empty(0, dtype=torch.int64) for part in module.parts}


def all_kept(module: PrunableModule) -> Kept:
    """Return the kept set of a whole module."""
    return {part: torch.arange(module.width) for part in module.parts}


def width_of(kept: Kept) -> int:
    """Return the number of channels of a kept set, which is the same in each part."""
    return len(next(iter(kept.values())))


def add(kept: Kept, channels: torch.Tensor) -> Kept:
    """Add `channels` (absolute indices) to every part of `kept`."""
    return {part: torch.cat([indices, channels.to(indices)]).unique(sorted=True) for part, indices in kept.items()}


def missing(module: PrunableModule, kept: Kept) -> torch.Tensor:
    """Return the sorted indices of the channels that are in no part of `kept`."""
    free = torch.ones(module.width, dtype=torch.bool)
    for indices in kept.values():
        free[indices] = False
    return free.nonzero().flatten()


def to_lists(kept: Kept) -> dict[str, list[int]]:
    """Convert a kept set to plain lists for JSON."""
    return {part: indices.tolist() for part, indices in kept.items()}


def from_lists(lists: Mapping[str, Iterable[int]]) -> Kept:
    """Convert the lists of `to_lists` back to a kept set."""
    return {part: torch.tensor(list(indices), dtype=torch.int64) for part, indices in lists.items()}


def check_kept(module: PrunableModule, kept: Kept, source: str = "kept set") -> None:
    """Raise a `UserError` naming `source`, module and part unless `kept` can be cut from `module`."""
    where = f"{source}: {module.name}"
    if set(kept) != set(module.parts):
        raise UserError(f"{where}: found parts {shorten(sorted(kept), 80)}, expected {sorted(module.parts)}")
    for part, indices in kept.items():
        if indices.dim() != 1:
            raise UserError(f"{where}: found {indices.dim()} axes of {part} channels, expected one")
        is_outside = len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < module.width
        if is_outside or bool((indices.diff() <= 0).any()):
            raise UserError(f"{where}: expected ascending {part} channels from 0 to {module.width - 1}")
        if module.is_attention:
            head_width = module.width // module.nheads
            counts = torch.bincount(indices // head_width, minlength=module.nheads).tolist()
            if len(set(counts)) > 1:
                raise UserError(
                    f"{where}: found {shorten(counts, 80)} {part} channels in the heads, expected equally many"
                )
    if len({len(indices) for indices in kept.values()}) > 1:
        raise UserError(f"{where}: found different numbers of {' and '.join(module.parts)} channels, expected the same")
