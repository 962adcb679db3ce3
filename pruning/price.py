"""What a search by budget spends: the cost of the transformer and of a channel of each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.detector import Detector
from pruning.budget import check_affordable
from pruning.config import SearchConfig
from pruning.cost import cost_of, macs_per_channel, params_per_channel
from pruning.search import Units


@dataclass(frozen=True)
class Prices:
    """Costs in parameters or multiply-accumulates.

    Attributes:
        total: of the whole transformer.
        per_channel: of each module.
        units: channels by which each module's width changes.
    """

    total: float
    per_channel: Mapping[str, float]
    units: Mapping[str, int]


def prices_of(config: SearchConfig, steps: Units, model: Detector, image_size_hw: tuple[int, int]) -> Prices:
    """The prices by `--cost`, for an image of that size in pixels.

    Raises:
        UserError: --keep asks for less than the least widths cost.
    """
    cost, modules = cost_of(model, image_size_hw), model.prunable_modules()
    units = {name: steps.channels(module) for name, module in modules.items()}
    if config.cost == "params":
        prices = Prices(cost.transformer_params, params_per_channel(model), units)
    else:
        prices = Prices(1e9 * cost.gmacs, macs_per_channel(model, image_size_hw), units)
    if config.keep is not None:
        check_affordable(config.keep, prices.total, modules, prices.per_channel, units)
    return prices
