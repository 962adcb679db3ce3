"""Costs of the transformer or detector and of each module's widths, for a search by budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.detector import Detector
from pruning.allocation import Tables, check_affordable, widths_tried
from pruning.config import SearchConfig
from pruning.cost import block_macs, block_params, cost_of, module_macs, module_params
from pruning.latency import LatencyTable
from pruning.search import Units
from util.errors import UserError


@dataclass(frozen=True)
class Prices:
    """Costs in parameters, multiply-accumulates or milliseconds.

    Attributes:
        total: cost of the whole transformer, or of the whole detector for that scope.
        costs: cost of each module at each of its widths; see `pruning.allocation`.
        outside: milliseconds of the rest of the detector.
    """

    total: float
    costs: Tables
    outside: float = 0.0

    @property
    def least(self) -> float:
        """Cost of the least widths."""
        return self.total - sum(max(table.values()) - min(table.values()) for table in self.costs.values())

    def fractions(self, config: SearchConfig) -> dict[str, float]:
        """Return the fraction of `total` that each of the search's budgets leaves, by the budgets' names.

        Raises:
            UserError: one is less than the least widths cost.
        """
        if config.target_ms is not None:
            return {name: self.fraction_in(value) for name, value in config.budgets.items()}
        for value in config.budgets.values():
            check_affordable(value, self.costs, self.total)
        return config.budgets

    def fraction_in(self, target_ms: float) -> float:
        """Return the fraction of `total` with which the whole detector takes `target_ms`.

        Raises:
            UserError: the least widths take longer.
        """
        if self.outside + self.least > target_ms:
            raise UserError(
                f"--target_ms {target_ms:g}: found less than the smallest widths take, expected at least "
                f"{math.ceil(1000 * (self.outside + self.least)) / 1000:g}"
            )
        return min((target_ms - self.outside) / self.total, 1.0)


def widths_of(model: Detector, scope: str, steps: Units) -> dict[str, list[int]]:
    """Return the widths that a search by budget may give each module of a scope, ascending."""
    modules = model.prunable_modules(scope)
    return {n: widths_tried(m.width, steps.channels(m), steps.min_units) for n, m in modules.items()}


def latency_prices(table: LatencyTable, widths: Mapping[str, Sequence[int]]) -> Prices:
    """Return the prices in milliseconds; those of the detector include the rest, those of the transformer do not."""
    costs, whole = table.costs(widths), {name: max(of_module) for name, of_module in widths.items()}
    detector = table.milliseconds(whole)
    total = detector if table.scope == "detector" else sum(costs[name][width] for name, width in whole.items())
    return Prices(total, costs, detector - total)


def prices_of(config: SearchConfig, steps: Units, model: Detector, image_size_hw: tuple[int, int]) -> Prices:
    """Return the prices in parameters or multiply-accumulates, for one image of that size in pixels.

    Raises:
        UserError: --keep is below the cost of the least widths.
    """
    cost, modules = cost_of(model, image_size_hw), model.prunable_modules()
    is_params, is_detector = config.cost_unit == "params", config.scope == "detector"
    of_modules = module_params(model) if is_params else module_macs(model, image_size_hw)
    costs: dict[str, dict[int, float]] = {}
    if is_detector:
        tables = block_params(model) if is_params else block_macs(model, image_size_hw)
        for name, module in model.prunable_modules("detector").items():
            if name in tables:
                widths = widths_tried(module.width, steps.channels(module), steps.min_units)
                costs[name] = {width: tables[name][width] for width in widths}
    for name, module in modules.items():
        widths = widths_tried(module.width, steps.channels(module), steps.min_units)
        costs[name] = {width: of_modules[name].at(width) for width in widths}
    if is_params:
        total: float = cost.params if is_detector else cost.transformer_params
    else:
        total = 1e9 * (cost.detector_gmacs if is_detector else cost.gmacs)
    prices = Prices(total, costs)
    prices.fractions(config)
    return prices
