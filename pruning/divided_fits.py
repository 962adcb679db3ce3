"""Fits that do not depend on each other, divided among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from models.prunable import PrunableModule
from models.residual import ResidualBlock
from pruning.convolution import kernel_area
from util import distributed
from util.phases import FITS, phase
from util.threads import idle_cores

T = TypeVar("T")


def inputs_of_fits(module: PrunableModule) -> list[int]:
    """Return the inputs of each layer whose channels are ranked and priced at once; none for an attention.

    Each convolution after pruned channels of a residual block has kh * kw inputs for a channel.
    """
    if isinstance(module.layer, ResidualBlock):
        layers = [convolution for convolution, _ in module.layer.convolutions()[1:]]
        return [layer.in_channels * kernel_area(layer) for layer in layers]
    return [] if module.is_attention else [module.width]


def cost_of_fits(module: PrunableModule) -> int:
    """Return what the fits of a module cost relative to those of others: matrices of its inputs are factorised."""
    return sum(inputs**3 for inputs in inputs_of_fits(module))


def owners(modules: Mapping[str, PrunableModule], processes: int) -> dict[str, int]:
    """Return the process that fits each module: the one with least to do, for the module that costs most first."""
    loads = [0] * processes
    found = {}
    for name in sorted(modules, key=lambda name: -cost_of_fits(modules[name])):  # equal ones stay in network order
        found[name] = loads.index(min(loads))
        loads[found[name]] += cost_of_fits(modules[name])
    return found


def busiest_share(modules: Mapping[str, PrunableModule], processes: int) -> float:
    """Return the fraction of all these fits that the process with most to do computes."""
    loads = [0] * processes
    for name, process in owners(modules, processes).items():
        loads[process] += cost_of_fits(modules[name])
    return max(loads) / max(1, sum(loads))


def most_held_elements(modules: Mapping[str, PrunableModule], processes: int) -> int:
    """Return the most elements of moments that a process keeps for its fits; a single process keeps none."""
    held = [0] * processes
    for name, process in owners(modules, processes).items():
        halves = 2 if isinstance(modules[name].layer, ResidualBlock) else 1  # of the images
        held[process] += halves * sum(inputs**2 for inputs in inputs_of_fits(modules[name]))
    return max(held) if processes > 1 else 0


class DividedFits(Generic[T]):
    """Fits of modules, each computed by one process, whose results every process gets.

    A single process computes each fit when it is added, so that the moments of one module are in memory at a time. One
    of several keeps those of its own modules until `results`, when all processes compute at the same time.
    """

    def __init__(self, modules: Mapping[str, PrunableModule]) -> None:
        """`modules` are those that will be added, in this order."""
        self._modules, self._owners = modules, owners(modules, distributed.world_size())
        self._fits: dict[str, Callable[[], T] | None] = {}
        self._done: dict[str, T] = {}
        self._widths = 0

    def add(self, name: str, fit: Callable[[], T], widths: int) -> None:
        """Add the fit of a module, which must not communicate; all processes add all modules.

        Args:
            widths: how many it prices. Those of an attention are counted when it is measured, and not here.
        """
        widths = widths if inputs_of_fits(self._modules[name]) else 0
        if distributed.world_size() == 1:
            with phase(FITS, widths):
                self._done[name] = fit()
            return
        self._fits[name] = fit if self._owners[name] == distributed.rank() else None
        self._widths += widths

    def results(self) -> dict[str, T]:
        """Return the result of each module, bitwise equal in every process.

        Raises:
            Exception: a fit failed; in every process, the error of the first module in network order.
        """
        if distributed.world_size() == 1:
            return self._done
        with phase(FITS, self._widths), idle_cores(everywhere=True):
            return distributed.on_each(self._fits)


def fit_everywhere(fit: Callable[[], T], widths: int) -> T:
    """Compute the same fit in all processes at once, to time it as one of `DividedFits`; return the main one's result.

    Args:
        widths: how many it prices.
    """
    names = map(str, range(distributed.world_size()))
    with phase(FITS, widths), idle_cores(everywhere=True):
        return distributed.on_each({name: fit if name == str(distributed.rank()) else None for name in names})["0"]
