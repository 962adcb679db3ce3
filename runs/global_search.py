"""Search by the damages of all modules at once: for budgets or a tolerance, perhaps with fewer decoder layers.

With `--min_dec_layers` one pass gives mAP of the unpruned detector after each decoder layer. The numbers of layers that
may win are tried, the most first. For a budget the one with the greatest mAP wins, for a tolerance the one that costs
least.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from models.detector import Detector
from pruning.budget import DETECTOR_POWERS, EVALUATIONS, BudgetSearch, cuts_at_most
from pruning.cost_tables import Prices
from pruning.journal import OUTPUT_NAME, Effort, Journal, Layers, Trial
from pruning.workbench import DetectorBench
from reports import search_log
from runs.config import SearchOptions
from runs.depth_search import ap_by_layers, first_layers_of
from runs.search_results import Result, SearchResults, budget_file
from util import distributed
from util.board import Board
from util.logging import bar_off, get_logger


@dataclass
class GlobalSearch:
    """A search by budgets or a tolerance; `run` returns its result.

    Attributes:
        options: of the search.
        model, bench: the detector with all decoder layers, and its bench.
        prices: by the number of decoder layers, the most first.
        base_ap: mAP in [0, 1] before the search.
        results: saves each detector that is found.
        journal, board: get each new trial.
        replayed: trials of a resumed search, in order.
        past_layers: mAP after each decoder layer that its journal has.
        after_trial: called after each new trial.
    """

    options: SearchOptions
    model: Detector
    bench: DetectorBench
    prices: Mapping[int, Prices]
    base_ap: float
    results: SearchResults
    journal: Journal
    board: Board
    replayed: Sequence[Trial]
    past_layers: Sequence[Layers]
    after_trial: Callable[[], Any]

    def __post_init__(self) -> None:
        self.effort = Effort(self.bench.counter, self.replayed)
        self._numbers = itertools.count(len(self.replayed) + 1)  # of TensorBoard's points
        self._layers = max(self.prices)  # of `model` and `bench`
        self._log = get_logger()

    def run(self, threshold_ap: float) -> Result:
        """Search for the budgets of the options; without any, for the least cost that keeps mAP at `threshold_ap`.

        Returns:
            The result, of the least budget if there are several; that of an unpruned detector if no trial passed.
        """
        config, least = self.options.search, self.prices[min(self.prices)]
        budgets = distributed.on_main(lambda: least.fractions(config))
        self._log.info("mAP to keep: %s", "any" if budgets else f"{threshold_ap:.4f}")
        layers_before = self._layers
        unpruned_ap = {layers_before: self.base_ap}
        if len(self.prices) > 1:
            unpruned_ap = ap_by_layers(self.bench, self.journal, self.past_layers, layers_before)
        found = self._for_budgets(budgets, unpruned_ap) if budgets else self._for_tolerance(threshold_ap, unpruned_ap)
        if config.min_dec_layers is not None:
            for name, result in found.items():
                about = f"budget {name}: " if budgets else ""
                self._log.info("%s%d of %d decoder layers are left", about, len(result.widths.decoder), layers_before)
        if len(budgets) > 1:
            self.results.points = found
        return next(iter(found.values()))

    def _for_budgets(self, budgets: Mapping[str, float], unpruned_ap: Mapping[int, float]) -> dict[str, Result]:
        """Find and save the detector of each budget, with the decoder layers that give it most mAP."""
        config = self.options.search
        found: dict[str, Result] = {}
        chosen: dict[str, Trial] = {}
        for layers, prices in self.prices.items():
            wanted = {
                name: keep
                for name, keep in budgets.items()
                if (layers == min(self.prices) or self._allows(prices, keep))
                and (name not in found or unpruned_ap[layers] > found[name].ap)
            }
            if not wanted:
                continue
            cuts = cuts_at_most(len(wanted), config.min_units)
            with self._search(layers, unpruned_ap[layers], cuts) as search:
                earlier = self.results.trials
                for name, (kept, trial) in zip(wanted, search.run_each([*wanted.values()]), strict=True):
                    self.results.trials = [*earlier, *search.trials]
                    if name in found and trial.full_ap <= found[name].ap:
                        continue
                    file_name = budget_file(name) if len(budgets) > 1 else OUTPUT_NAME
                    found[name] = self.results.result(self.base_ap, trial.full_ap, kept, self.model, file_name)
                    chosen[name] = trial
                    distributed.on_main(functools.partial(self.results.save, found[name]))
        self.results.chosen = [chosen[name] for name in budgets]
        return {name: found[name] for name in budgets}

    def _allows(self, prices: Prices, keep: float) -> bool:
        return distributed.on_main(lambda: prices.allows(keep, self.options.search.keep_params))

    def _for_tolerance(self, threshold_ap: float, unpruned_ap: Mapping[int, float]) -> dict[str, Result]:
        """Find and save the detector that costs least and keeps mAP at `threshold_ap`.

        Fewer layers than before are not tried if their unpruned mAP is below it, and no number of layers that cannot
        cost less than the least found so far.
        """
        result: Result | None = None
        best: Trial | None = None
        for layers, prices in self.prices.items():
            below = None if best is None else best.kept_fraction
            is_too_low = layers < self._layers and unpruned_ap[layers] < threshold_ap
            if is_too_low or (below is not None and prices.least >= below * prices.total):
                continue
            with self._search(layers, unpruned_ap[layers], EVALUATIONS, threshold_ap) as search:
                earlier = self.results.trials
                kept, trial = search.run(None, threshold_ap, below)
                self.results.trials = [*earlier, *search.trials]
            if trial is None and result is not None:
                continue
            ap = self.base_ap if trial is None else trial.full_ap
            result, best = self.results.result(self.base_ap, ap, kept, self.model), trial
            if trial is not None:
                self.results.chosen = [trial]
                distributed.on_main(functools.partial(self.results.save, result))
        assert result is not None  # all layers are tried unless fewer have a result
        return {"": result}

    @contextlib.contextmanager
    def _search(
        self, layers: int, base_ap: float, cuts: int, threshold_ap: float | None = None
    ) -> Iterator[BudgetSearch]:
        """Yield a search with the first `layers` decoder layers; each new trial is shown, logged and written.

        Args:
            layers: at most as many as the search before it had.
            base_ap: mAP of these layers unpruned.
            cuts: the most that the search makes.
            threshold_ap: mAP to keep, without a budget.
        """
        if layers < self._layers:
            self.bench.reset()
            self.model, criterion = first_layers_of(self.options, self.model, layers)
            self.bench, self._layers = self.bench.shallower(self.model, criterion), layers
        config, prices = self.options.search, self.prices[layers]
        decoder_layers = None if config.min_dec_layers is None else layers
        search = BudgetSearch(
            self.bench, prices, base_ap, config.keep_params, decoder_layers=decoder_layers, effort=self.effort
        )
        search.replayed = [trial for trial in self.replayed if trial.decoder_layers == decoder_layers]
        if config.scope == "detector":
            search.powers = DETECTOR_POWERS
        with tqdm(total=(1 + cuts) * len(self.bench.modules), unit="module", disable=bar_off(), leave=False) as bar:

            def record(trial: Trial) -> None:
                distributed.on_main(lambda: self.journal.trial(trial))
                self.board.add(search_log.trial_scalars(trial), next(self._numbers))
                self._log.info("%s", search_log.trial_line(trial))
                bar.set_postfix_str(search_log.trial_summary(trial, threshold_ap))
                self.after_trial()

            def show(name: str, width: int | None) -> None:
                bar.set_description(f"{name} {'every width' if width is None else width}", refresh=False)
                bar.update()

            search.on_trial, search.progress = record, show
            yield search
