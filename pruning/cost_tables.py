"""Costs of the transformer and of each module's widths, for a search by budget."""

from __future__ import annotations

from dataclasses import dataclass

from models.detector import Detector
from pruning.allocation import Tables, check_affordable, linear_costs
from pruning.config import SearchConfig
from pruning.cost import cost_of, macs_per_channel, params_per_channel
from pruning.search import Units


@dataclass(frozen=True)
class Prices:
    """Costs in parameters or multiply-accumulates.

    Attributes:
        total: cost of the whole transformer.
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
    units = {name: steps.channels(module) for name, module in modules.items()}
    if config.cost == "params":
        prices = Prices(cost.transformer_params, linear_costs(modules, params_per_channel(model), units))
    else:
        prices = Prices(1e9 * cost.gmacs, linear_costs(modules, macs_per_channel(model, image_size_hw), units))
    if config.keep is not None:
        check_affordable(config.keep, prices.costs, prices.total)
    return prices
