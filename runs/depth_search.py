"""Detectors with fewer decoder layers, their prices and their mAP, for searches with `--min_dec_layers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from models import build
from models.criterion import Criterion
from models.detector import Detector
from models.widths import Widths
from pruning.cost_tables import Prices, latency_prices, params_prices, prices_of
from pruning.journal import Journal, Layers
from pruning.latency_table import LatencyTable
from pruning.search import Units
from pruning.workbench import DetectorBench
from reports.folder import model_with
from runs.config import SearchOptions
from util import distributed
from util.errors import UserError
from util.logging import get_logger, table
from weights.decoder_layers import LAYER, first_of


def check_min_layers(options: SearchOptions) -> None:
    """Raise a `UserError` if the detector has fewer decoder layers than --min_dec_layers."""
    least, found = options.search.min_dec_layers, options.detector.dec_layers
    if least is not None and least > found:
        raise UserError(f"--min_dec_layers {least}: the detector has {found} decoder layers, expected 1 to {found}")


def fewer_layers(options: SearchOptions) -> range:
    """Return the numbers of decoder layers to try besides all, the most first."""
    layers = options.detector.dec_layers
    return range(layers - 1, (options.search.min_dec_layers or layers) - 1, -1)


def with_layers(options: SearchOptions, layers: int) -> SearchOptions:
    """Return the options of the detector with its first decoder layers."""
    cfgs = options.detector.cfgs
    return options.with_values({"dec_layers": layers, "cfgs": None if cfgs is None else cfgs.first_layers(layers)})


def first_layers_of(options: SearchOptions, whole: Detector, layers: int) -> tuple[Detector, Criterion]:
    """Return a detector with the first decoder layers of `whole` and their weights, on its device, and its losses."""
    options, device = with_layers(options, layers), next(whole.parameters()).device
    with torch.random.fork_rng(devices=[]):  # the weights are replaced
        model, criterion, _ = build(options.detector, options.losses)
    model.load_state_dict(first_of(LAYER, whole.state_dict(), layers))
    return model.to(device), criterion.to(device)


def prices_by_layers(
    options: SearchOptions, units: Units, model: Detector, image_size_hw: tuple[int, int]
) -> dict[int, Prices]:
    """Return the prices in parameters or multiply-accumulates by the number of decoder layers, the most first."""
    detectors = _by_layers(options, model)
    return _of_all_layers({n: prices_of(options.search, units, d, image_size_hw) for n, d in detectors.items()})


def params_by_layers(
    options: SearchOptions, units: Units, model: Detector, image_size_hw: tuple[int, int]
) -> dict[int, Prices | None]:
    """Return the prices in parameters of the detector of each number of decoder layers; None without --keep_params."""
    detectors = _by_layers(options, model)
    return {n: params_prices(options.search, units, d, image_size_hw) for n, d in detectors.items()}


def latencies_by_layers(
    options: SearchOptions, found: LatencyTable, widths: Mapping[str, Sequence[int]], full_widths: Widths,
    params: Mapping[int, Prices | None],
) -> dict[int, Prices]:  # fmt: skip
    """Return the prices in milliseconds by the number of decoder layers, the most first.

    Args:
        found: the latencies of all modules.
        widths: that the search may give each module.
        full_widths: of the detector before the search.
        params: of `params_by_layers`.
    """
    prices = {}
    for layers, of_params in params.items():
        left = full_widths.first_layers(layers).names()
        of_left = {name: of_module for name, of_module in widths.items() if name in left}
        prices[layers] = latency_prices(found, of_left, of_params)
    return _of_all_layers(prices)


def _by_layers(options: SearchOptions, model: Detector) -> dict[int, Detector]:
    """Return `model`, and detectors like it with the numbers of decoder layers to try, by these numbers."""
    widths = model.widths_in(options.search.scope)
    fewer = {layers: model_with(options.detector, widths.first_layers(layers)) for layers in fewer_layers(options)}
    return {options.detector.dec_layers: model, **fewer}


def _of_all_layers(prices: Mapping[int, Prices]) -> dict[int, Prices]:
    """Return prices whose fractions are those of the detector with all layers; each is that of its own layers."""
    whole = prices[max(prices)]
    return {layers: whole.with_layers(of_layers) for layers, of_layers in prices.items()}


def ap_by_layers(bench: DetectorBench, journal: Journal, past: Sequence[Layers], layers: int) -> dict[int, float]:
    """Return mAP of the unpruned detector by the number of decoder layers, of which it has `layers`; log a table.

    It is written to the journal, or comes from its lines `past` if the search is resumed.

    Raises:
        UserError: those have another number of layers.
    """
    if past:
        found = past[-1].ap_by_layer
    else:
        found = bench.ap_by_layer()
        distributed.on_main(lambda: journal.layers(Layers(found)))
    if len(found) != layers:
        raise UserError(f"{journal.path}: found mAP after {len(found)} decoder layers, expected {layers}")
    rows = [*enumerate(found, 1)]
    get_logger().info("%s", table(["decoder layers", "mAP, unpruned"], rows))
    return dict(rows)
