"""Costs of the transformer or detector and of each module's widths, for a search by budget."""

from __future__ import annotations

from dataclasses import dataclass

from models.detector import Detector
from pruning.allocation import Tables, check_affordable, widths_tried
from pruning.config import SearchConfig
from pruning.cost import block_macs, block_params, cost_of, module_macs, module_params
from pruning.search import Units


@dataclass(frozen=True)
class Prices:
    """Costs in parameters or multiply-accumulates.

    Attributes:
        total: cost of the whole transformer, or of the whole detector for that scope.
        costs: cost of each module at each of its widths; see `pruning.allocation`.
    """

    total: float
    costs: Tables


def prices_of(config: SearchConfig, steps: Units, model: Detector, image_size_hw: tuple[int, int]) -> Prices:
    """Return the prices in the unit of `--cost`, for one image of that size in pixels.

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
    if config.keep is not None:
        check_affordable(config.keep, prices.costs, prices.total)
    return prices
