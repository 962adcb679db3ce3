"""Damages of many widths of a layer's inputs at once: kept sets that contain each other share one factorisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pruning.convolution import inputs_of_channels
from pruning.finite_checks import checked
from pruning.kept_channels import Kept

Chain = Mapping[int, Tensor]
Pricing = Callable[[Mapping[int, Kept]], dict[int, float]]  # damages of kept sets by width


def damages_of_sets(what: str, sets: Mapping[int, Tensor], price: Callable[[Chain], Tensor]) -> dict[int, float]:
    """Return the damage of each kept set by width.

    Args:
        what: name of the fit in errors.
        sets: kept channels by width.
        price: returns the damages of a chain.

    Raises:
        NonFiniteLossError: a factorisation fails or a damage is not finite.
    """
    damages: dict[int, float] = {}
    for chain in chains(sets):
        found = checked(what, functools.partial(price, chain), lambda found: [found])
        damages |= zip(chain, found.tolist(), strict=True)
    return damages


def chains(sets: Mapping[int, Tensor]) -> list[dict[int, Tensor]]:
    """Divide kept sets into chains, in which each set contains those before it."""
    found: list[dict[int, Tensor]] = []
    for key, channels in sorted(sets.items(), key=lambda item: len(item[1])):
        last = [*found[-1].values()][-1] if found else None
        if last is None or not torch.isin(last, channels).all():
            found.append({})
        found[-1][key] = channels
    return found


def inputs_of_chain(chain: Chain, channels: int, area: int = 1) -> Tensor:
    """Return all inputs of a layer of so many channels, `area` for each, those of a chain's first set first, and so on.

    The inputs of each set are then a prefix, see `pruning.least_squares.errors_of_prefixes`.
    """
    order = torch.cat([*chain.values(), torch.arange(channels)]).tolist()
    return inputs_of_channels(torch.tensor([*dict.fromkeys(order)]), area)
