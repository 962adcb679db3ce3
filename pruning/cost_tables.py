"""Costs of the transformer or detector and of each module's widths, for a search by budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from models.detector import Detector
from pruning.allocation import (
    ROUNDING,
    Budget,
    Shared,
    Tables,
    is_affordable,
    rounded_up,
    widths_tried,
)
from pruning.config import SearchConfig
from pruning.cost import block_macs, block_params, cost_of, module_macs, module_params, shared_macs
from pruning.latency_table import LatencyTable
from pruning.search import Units
from pruning.two_budgets import least_within
from util.errors import UserError


@dataclass(frozen=True)
class Prices:
    """Costs in parameters, multiply-accumulates or milliseconds.

    Attributes:
        total: cost of the whole transformer, or of the whole detector for that scope.
        costs: cost of each module at each of its widths; see `pruning.allocation`.
        outside: milliseconds of the rest of the detector.
        params: the prices in parameters, with --keep_params.
        dropped: the part of `total` in dropped decoder layers, whose modules `costs` lack.
        shared: the parts of `total` that are gone where several modules are; `costs` leave them out.
    """

    total: float
    costs: Tables
    outside: float = 0.0
    params: Prices | None = None
    dropped: float = 0.0
    shared: tuple[Shared, ...] = ()

    @property
    def least(self) -> float:
        """Cost of the least widths."""
        return self._cost({name: min(table, key=table.__getitem__) for name, table in self.costs.items()})

    def kept_fraction(self, widths: Mapping[str, int]) -> float:
        """Return the fraction of `total` that is left with these widths."""
        return self._cost(widths) / self.total

    def _cost(self, widths: Mapping[str, int]) -> float:
        gone = (table[max(table)] - table[widths[name]] for name, table in self.costs.items())
        return self.total - self.dropped - sum(gone) - sum(shared.cost for shared in self.shared_gone(widths))

    def shared_gone(self, widths: Mapping[str, int]) -> list[Shared]:
        """Return the shared parts that no module of these widths uses."""
        return [shared for shared in self.shared if shared.is_gone(widths)]

    def check(self, keep: float, option: str = "keep") -> None:
        """Raise a `UserError` if the smallest widths cost more than the fraction `keep` of `total`."""
        if not is_affordable(keep, self.least, self.total):
            raise UserError(
                f"--{option} {keep:g}: found less than the smallest widths cost, expected at least "
                f"{rounded_up(self.least / self.total)}"
            )

    def budget(self, keep: float, gone: Collection[Shared] = ()) -> Budget:
        """Return the limit for the modules that leaves the fraction `keep` of `total`, at least the least widths.

        It may be missed by `ROUNDING`, so that a fraction that some widths leave exactly allows these widths. Users of
        the shared parts `gone` have width 0.
        """
        fixed = self.total - self.dropped - sum(table[max(table)] for table in self.costs.values())
        removed = {name for shared in gone for name in shared.users}
        costs = {name: {0: table[0]} if name in removed else table for name, table in self.costs.items()}
        least = sum(min(table.values()) for table in costs.values())  # is affordable, whatever the rounding
        limit = (keep + ROUNDING) * self.total - fixed + sum(shared.cost for shared in gone)
        return Budget(costs, max(limit, least))

    def allows(self, keep: float, keep_params: float | None) -> bool:
        """Return whether some widths leave at most the fraction `keep`, and `keep_params` of the parameters, if any."""
        if not is_affordable(keep, self.least, self.total):
            return False
        if keep_params is None:
            return True
        assert self.params is not None
        if not is_affordable(keep_params, self.params.least, self.params.total):
            return False
        return self.params.budget(keep_params).fits(least_within(self.params.costs, self.budget(keep)))

    def fractions(self, config: SearchConfig) -> dict[str, float]:
        """Return the fraction of `total` that each of the search's budgets leaves, by the budgets' names.

        Raises:
            UserError: one is less than the least widths cost.
        """
        if config.target_ms is not None:
            fractions = {name: self.fraction_in(value) for name, value in config.budgets.items()}
        else:
            fractions = config.budgets
            for value in fractions.values():
                self.check(value)
        if config.keep_params is not None:
            option = "keep" if config.target_ms is None else "target_ms"
            for asked, keep in zip(config.budgets.values(), fractions.values(), strict=True):
                self._check_params(config.keep_params, keep, f"--{option} {asked:g}")
        return fractions

    def _check_params(self, keep_params: float, keep: float, other: str) -> None:
        """Raise a `UserError` if no widths meet --keep_params and the budget `keep`, which is typed as `other`."""
        assert self.params is not None
        params = self.params
        params.check(keep_params, "keep_params")
        if not self.allows(keep, keep_params):
            least = params.kept_fraction(least_within(params.costs, self.budget(keep)))
            raise UserError(
                f"--keep_params {keep_params:g}: found less than is possible with {other}, expected at least "
                f"{rounded_up(least)}"
            )

    def with_layers(self, fewer: Prices) -> Prices:
        """Return these prices without the last decoder layers; `fewer` are those of the detector without them."""
        params = None
        if self.params is not None and fewer.params is not None:
            params = self.params.with_layers(fewer.params)
        return replace(self, costs=fewer.costs, dropped=self.total - fewer.total, shared=fewer.shared, params=params)

    def fraction_in(self, target_ms: float) -> float:
        """Return the fraction of `total` with which the whole detector takes `target_ms`.

        Raises:
            UserError: the least widths take longer, or the whole detector takes no longer.
        """
        if target_ms >= self.outside + self.total:
            raise UserError(
                f"--target_ms {target_ms:g}: found no less than the unpruned detector takes, expected less than "
                f"{self.outside + self.total:.4g} ms"
            )
        keep = (target_ms - self.outside) / self.total
        if not is_affordable(keep, self.least, self.total):
            raise UserError(
                f"--target_ms {target_ms:g}: found less than the smallest widths take, expected at least "
                f"{math.ceil(1000 * (self.outside + self.least)) / 1000:.12g}"
            )
        return keep


def widths_of(model: Detector, scope: str, steps: Units) -> dict[str, list[int]]:
    """Return the widths that a search by budget may give each module of a scope, ascending."""
    modules = model.prunable_modules(scope)
    return {n: widths_tried(m.width, steps.channels(m), steps.min_units) for n, m in modules.items()}


def latency_prices(table: LatencyTable, widths: Mapping[str, Sequence[int]], params: Prices | None = None) -> Prices:
    """Return the prices in milliseconds; those of the detector include the rest, those of the transformer do not.

    Those besides prices in parameters include all widths: one that is slower than a larger one has fewer parameters.
    """
    costs = table.costs(widths, every=params is not None)
    whole = {name: max(of_module) for name, of_module in widths.items()}
    detector = table.milliseconds(whole)
    shared = table.shared(widths)
    of_modules = sum(costs[name][width] for name, width in whole.items()) + sum(part.cost for part in shared)
    total = detector if table.scope == "detector" else of_modules
    return Prices(total, costs, detector - total, params, shared=shared)


def prices_of(config: SearchConfig, steps: Units, model: Detector, image_size_hw: tuple[int, int]) -> Prices:
    """Return the prices in parameters or multiply-accumulates, for one image of that size in pixels."""
    prices = _prices_in(config.cost_unit, config.scope, steps, model, image_size_hw)
    return replace(prices, params=params_prices(config, steps, model, image_size_hw))


def params_prices(config: SearchConfig, steps: Units, model: Detector, image_size_hw: tuple[int, int]) -> Prices | None:
    """Return the prices in parameters, None without --keep_params."""
    return None if config.keep_params is None else _prices_in("params", config.scope, steps, model, image_size_hw)


def _prices_in(cost_unit: str, scope: str, steps: Units, model: Detector, image_size_hw: tuple[int, int]) -> Prices:
    cost, modules = cost_of(model, image_size_hw), model.prunable_modules()
    is_params, is_detector = cost_unit == "params", scope == "detector"
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
    return Prices(total, costs, shared=() if is_params else shared_macs(model, image_size_hw))
