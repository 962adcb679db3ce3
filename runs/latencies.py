"""Latencies of a search: measure or read their table, and compare it with the slim detector at the end."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from models.detector import Detector
from models.widths import Widths
from pruning.cost_tables import Prices, widths_of
from pruning.journal import Journal, Turn
from pruning.latency import Measurement, cut_copy, measure_whole, random_images, unpruned_copy
from pruning.latency_table import TABLE_NAME, Entry, LatencyTable, Setting, check_table, read_table
from pruning.search import Units
from pruning.step_timing import kinds_of, launches_dominate, steps_of
from runs.config import SearchOptions
from runs.depth_search import latencies_by_layers
from util import distributed
from util.environment import environment
from util.errors import reason_of
from util.files import write_json
from util.logging import bar_off, get_logger


class Latencies:
    """Latencies of the modules of one search, measured in the main process.

    Attributes:
        setting: what they are measured with.
        table: the table, None until `prices` has measured it.
    """

    def __init__(
        self,
        options: SearchOptions,
        model: Detector,
        units: Units,
        image_size_hw: tuple[int, int],
        device: torch.device,
    ) -> None:
        """Read and check --latency_table, if it is given.

        Raises:
            UserError: it was measured for another detector, setting or other widths.
        """
        config = options.search
        self.scope, self.device, self._model, self._options = config.scope, device, model, options
        self.setting = Setting.of(device, image_size_hw, options.data.batch_size, config.amp)
        self.widths = widths_of(model, self.scope, units)
        self.table: LatencyTable | None = None
        self._given = None if config.latency_table is None else Path(config.latency_table)
        if self._given is not None:
            self.table = distributed.on_main(self._read)

    def _read(self) -> LatencyTable:
        assert self._given is not None
        found = read_table(self._given, self.setting, self.scope)
        whole = unpruned_copy(self._model, self.scope)
        steps = steps_of(whole, random_images(self.setting, self.device), self.scope)
        check_table(found, kinds_of(steps, self.device, self.setting.amp), self.widths, self._given)
        return found

    def facts(self) -> dict[str, Any]:
        """Return what the latencies depend on, for the journal."""
        given = None
        if self._given is not None and self.table is not None:
            given = hashlib.sha256(json.dumps(self.table.to_dict()).encode()).hexdigest()
        return {**self.setting.to_dict(), "table": given}

    def prices(
        self,
        journal: Journal,
        turns: Sequence[Turn],
        output_dir: Path,
        after_turn: Callable[[], Any],
        params: Mapping[int, Prices | None],
    ) -> dict[int, Prices]:
        """Return the prices in milliseconds by the number of decoder layers, the most first.

        What `turns` lack is measured, and the table written to `output_dir`. Each turn is written to the journal.
        `after_turn` is called after each. `params` are those of `params_by_layers`.
        """
        log = get_logger()
        if self.table is None:
            graphs = turns[0].graphs if turns else distributed.on_main(self._launches_dominate)
            measurement = Measurement(self._model, self.scope, self.setting, self.widths, self.device, turns, graphs)
            log.info("latencies of %s", self.setting)
            with tqdm(desc="latencies", unit="turn", disable=bar_off(), leave=False, initial=len(turns)) as bar:
                while len(measurement.turns) < measurement.num_turns:
                    bar.total = measurement.num_turns
                    measurement.add(distributed.on_main(measurement.measure))
                    distributed.on_main(lambda: journal.turn(measurement.turns[-1]))
                    bar.update()
                    after_turn()
            self.table = distributed.on_main(measurement.table)
        else:
            log.info("latencies of %s, from %s", self.setting, self._given)
        found = self.table
        distributed.on_main(
            lambda: write_json(output_dir / TABLE_NAME, {"environment": environment(self.device), **found.to_dict()})
        )
        full_widths = self._model.widths_in(self.scope)
        prices = latencies_by_layers(self._options, found, self.widths, full_widths, params)
        whole, least = prices[max(prices)], prices[min(prices)].least
        log.info(
            "the whole detector takes %.4g ms, of which %.4g ms are in the scope; at least %.4g ms with the fastest "
            "widths", whole.outside + whole.total, whole.total, whole.outside + least,
        )  # fmt: skip
        return prices

    def _launches_dominate(self) -> bool:
        whole, images = unpruned_copy(self._model, self.scope), random_images(self.setting, self.device)
        return launches_dominate(whole, images, self.device, self.setting.amp)

    def compare(self, slim: Mapping[str, tuple[Detector, Widths]]) -> dict[str, Any] | None:
        """Time the detector before and after the search in turns.

        Args:
            slim: by name, a detector that the search cut, perhaps with fewer decoder layers, and its widths.

        Returns:
            What was timed, and under `detectors`, by name, the first of which is `before`, measured and predicted
            milliseconds. None if timing fails; a warning says why.
        """
        found = self.table
        assert found is not None
        cuts = {"before": {name: max(of_module) for name, of_module in self.widths.items()}}
        models = {"before": functools.partial(cut_copy, self._model, self.scope, cuts["before"])}
        for name, (model, widths) in slim.items():
            cuts[name] = {module: widths.of(module) for module in model.prunable_modules(self.scope)}
            models[name] = functools.partial(cut_copy, model, self.scope, cuts[name])
        try:
            measured = measure_whole(models, self.setting, self.device, graphs=found.graphs)
        except RuntimeError as error:  # such as too little memory; the search has its result
            get_logger().warning("the detectors before and after could not be timed: %s", reason_of(error))
            return None
        detectors = {name: _compared(measured[name], found.milliseconds(cut)) for name, cut in cuts.items()}
        return {"graphs": found.graphs, "setting": str(self.setting), "detectors": detectors}


def _compared(measured: Entry, predicted: float) -> dict[str, float]:
    return {**dataclasses.asdict(measured), "predicted": predicted, "ratio": predicted / measured.milliseconds}
