"""Run a search, from the detector to the output files."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets.coco import split_of
from datasets.coco_eval import evaluator_name
from datasets.notices import measured_notices
from datasets.sizes import size_notices
from models.criterion import Criterion
from models.detector import Detector
from pruning.checks import (
    check_base_ap,
    check_targets,
    lowest_target_ap,
    warn_of_base_ap,
    warn_of_images,
    warn_of_low_target,
)
from pruning.cost_tables import Prices
from pruning.journal import JOURNAL_NAME, OUTPUT_NAME, Decision, Journal, Layers, Trial, Turn, read_events
from pruning.schedule import Schedule
from pruning.search import Search
from pruning.transplant import widths_after
from reports import search_log
from runs.config import SearchOptions
from runs.depth_search import params_by_layers, prices_by_layers
from runs.fewer_queries import KeptQueries
from runs.global_search import GlobalSearch
from runs.latencies import Latencies
from runs.plan import RunPlan
from runs.search_facts import ADDED, UNREAD, search_facts
from runs.search_plan import Past, SearchPlanner, read_past
from runs.search_results import Result, SearchResults
from runs.search_setup import SearchSetup
from util import distributed
from util.board import Board
from util.environment import record_run
from util.errors import RunFailedError
from util.interrupt import stop_after_step
from util.logging import Notice, bar_off, get_logger, show
from util.phases import LATENCIES, PhaseClock, phase
from weights.checkpoint_file import plain_arguments


class SearchRun:
    """One search from the detector to its output files."""

    def __init__(
        self, schedule: Schedule, options: SearchOptions, model: Detector, output_dir: Path, device: torch.device,
        kept_queries: KeptQueries | None = None,
    ) -> None:  # fmt: skip
        self.schedule, self.options, self.model, self.device = schedule, options, model, device
        self.output_dir, self.config, self.split = output_dir, options.search, options.search.split
        self.units = options.search.units(options.detector.nheads, options.run.seed)
        self.log = get_logger()
        self.results = SearchResults(schedule, options, model, output_dir, device)
        self.kept_queries = kept_queries
        # Log lines about queries and data from before the log file was opened.
        self.notices: list[Notice] = [] if kept_queries is None else [kept_queries.notice]
        self.full_widths = model.widths_in(self.config.scope)
        self.board = Board(output_dir, options.log.tensorboard)
        self.clock, self._began = PhaseClock(device), time.perf_counter()
        self.plan: RunPlan | None = None

    def prepare(self, criterion: Criterion, postprocess: Any) -> None:
        """Read the annotations, and check the budgets as far as they are known."""
        config = self.config
        self.setup = SearchSetup(
            self.options, self.model, criterion, postprocess, self.device, self.output_dir / JOURNAL_NAME
        )
        self.notices += measured_notices(self.setup.dataset, self.options.detector.matching_queries)
        show(self.notices)
        self.image_size_hw = self.results.image_size_hw = self.setup.image_size_hw
        if config.cost_unit == "latency":
            self.results.latencies = Latencies(self.options, self.model, self.units, self.image_size_hw, self.device)
        else:
            self.prices = prices_by_layers(self.options, self.units, self.model, self.image_size_hw)
            self.prices[min(self.prices)].fractions(config)

    def estimate(self) -> None:
        """Plan the search, what is left of it when it is resumed, and show the plan.

        Raises:
            UserError: the journal belongs to another search, or memory is too small.
        """
        journal = Journal(self.output_dir / JOURNAL_NAME)
        past = read_past(journal, self._facts) if self.config.resume_search else Past()
        self.plan = SearchPlanner(self.setup, self.schedule, self.units, past).plan()
        notice = (logging.INFO, self.plan.text())
        show([notice])
        self.notices.append(notice)

    def _facts(self, base_ap: float, is_cache_halved: bool) -> dict[str, Any]:
        """Return what the result depends on, for the journal."""
        latencies = self.results.latencies
        return search_facts(
            self.options, self.schedule, self.units, self.full_widths, base_ap, is_cache_halved,
            kept_queries=None if self.kept_queries is None else self.kept_queries.indices,
            latency={} if latencies is None else latencies.facts(),
        )  # fmt: skip

    def cache_features(self) -> None:
        """Read the images once and cache their backbone features."""
        images, shapes = self.setup.all_images()
        planner = self.setup.planner(shapes, *images.kept_and_calibrated(self.config.method))
        bar = functools.partial(tqdm, desc="backbone", leave=False, disable=bar_off())
        self.bench = self.setup.bench(images, planner, bar)
        self.notices += [*planner.notices, *(found := size_notices(images.batches))]
        show(found)

    def base_ap(self) -> float:
        """Return the mAP before the search, above 0 unless --keep is given.

        Raises:
            UserError: the mAP or a target is not above 0, with which every module would shrink to one unit.
        """
        base_ap = self.bench.full_ap()
        check_base_ap(split_of(self.options.data, self.split), self.options.run.resume, base_ap, self.config.has_budget)
        if not self.config.has_budget:
            check_targets(self.schedule, base_ap, self._visits)
        return base_ap

    @property
    def _visits(self) -> int:
        """Return the number of modules to visit in turn, 0 for a search of all at once."""
        return 0 if self.bench.method.search == "global" else len(self.bench.modules)

    def search(self, base_ap: float) -> Result:
        """Search and write the result; `base_ap` is the mAP before the search.

        A search by visits writes its output file after each module that it narrows, so a killed search leaves its
        result so far. Every search keeps a journal, from which --resume_search continues. At the end the processes
        leave their group, and the main one writes the report. If nothing could be removed, the report comes first:
        torchrun ends all processes when one fails.

        Raises:
            RunFailedError: nothing could be removed; this is recorded in the journal, and there is no output file.
        """
        self.journal, cache = Journal(self.output_dir / JOURNAL_NAME), self.bench.cache
        self.log.info(
            "%s on %s: %d images, mAP %.4f before, by %s; features take %.0f MB on %s%s",
            self.schedule.name, self.split, self.setup.num_images, base_ap, evaluator_name(),
            cache.nbytes / 1e6, cache.storage.device, " in bfloat16" if cache.storage.dtype else "",
        )  # fmt: skip
        if left_out := cache.images_without_features():
            self.log.info("%d images are not cached: each pass reads them and runs the backbone (--cache_gb)", left_out)
            calibrated, passes = self.bench.uncached_fits()
            if calibrated and passes:
                self.log.info(
                    "%d of them are for calibration: in a trial, the fit of a residual block needs at most %d passes",
                    calibrated, passes,
                )  # fmt: skip
        self._warn(base_ap)
        is_global = self.bench.method.search == "global"
        base_ap, past = self._open_journal(self._facts(base_ap, cache.storage.dtype is not None))
        turns = read_events(past, "latency", Turn, self.journal.path)
        self.past_layers = read_events(past, "layers", Layers, self.journal.path)
        past = [line for line in past if line["event"] in ("decision", "trial")]
        self.board.open(len(past))
        self.board.add({"search/mAP": base_ap}, 0)
        hint = f"stopped; continue with the same command and --resume_search, from {self.journal.path}"
        with stop_after_step(hint) as self.stop_if_asked:
            if self.results.latencies is not None:
                self.prices = self._measured_prices(self.results.latencies, turns)
            result = (self._search_globally if is_global else self._search_modules)(base_ap, past)
            self.stop_if_asked()
        passed = self.config.has_budget or result.widths != self.full_widths
        outcome = self._outcome(result, passed)
        if passed:
            distributed.on_main(lambda: self.results.write(result, self.journal, outcome))
        else:
            distributed.on_main(lambda: self.results.write_failure(self.journal, outcome))
        if self.plan is not None:
            self.log.info("%s", self.plan.compared(self.clock, time.perf_counter() - self._began))
        self.board.close()
        if not passed:
            target_ap = lowest_target_ap(self.schedule, base_ap, self._visits)
            raise RunFailedError(
                f"no trial passed: none with fewer channels kept mAP at {target_ap:.4f} ({base_ap:.4f} before); no "
                f"{OUTPUT_NAME} was written; {self.journal.path} lists the trials"
            )
        self._report_alone()
        return result

    def _report_alone(self) -> None:
        """Leave the group of processes, and write the report in the main one: the others would wait for it."""
        is_main = distributed.is_main()
        distributed.stop()
        if is_main:
            try:
                self.results.write_report()
            except KeyboardInterrupt:
                hint = f"the search has ended; python -m reports {self.output_dir} writes its report"
                raise KeyboardInterrupt(f"interrupted: {hint}") from None

    def _measured_prices(self, latencies: Latencies, turns: Sequence[Turn]) -> dict[int, Prices]:
        """Return the prices in milliseconds by the number of decoder layers; `turns` are those of the journal."""
        with phase(LATENCIES) as entry:

            def after_turn() -> None:
                entry.count += 1
                self.stop_if_asked()

            return latencies.prices(
                self.journal, turns, self.output_dir, after_turn,
                params_by_layers(self.options, self.units, self.model, self.image_size_hw),
            )  # fmt: skip

    def _warn(self, base_ap: float) -> None:
        """Log warnings about the result before the search begins."""
        if not distributed.is_main():
            return
        warn_of_base_ap(base_ap)
        if not self.config.has_budget:
            warn_of_low_target(lowest_target_ap(self.schedule, base_ap, self._visits), base_ap)
        warn_of_images(self.options.data, self.split, self.bench.method.is_calibrated)

    def _open_journal(self, facts: Mapping[str, Any]) -> tuple[float, list[dict[str, Any]]]:
        """Begin the journal or, when resuming, read it; the result is the same in every process.

        Returns:
            mAP before the search, as measured when the search began, and the lines after the first.
        """

        def begin() -> tuple[float, list[dict[str, Any]]]:
            base_ap: float = facts["base_ap"]
            past: list[dict[str, Any]] = []
            if self.config.resume_search:
                base_ap, past = self.journal.resume(facts, UNREAD, ADDED)
            if not past:
                self.results.move_aside()
                if not self.journal.begun:
                    self.journal.start(facts)
            record_run(
                self.output_dir,
                plain_arguments(self.options.values()),
                self.device,
                evaluator_name(),
                continuing=self.config.resume_search,
            )
            return base_ap, past

        base_ap, past = distributed.on_main(begin)
        if past:
            self.log.info("continuing after %d journal lines of %s", len(past), self.journal.path)
        elif self.config.resume_search:
            self.log.info("%s holds no decision yet: starting the search", self.journal.path)
        return base_ap, past

    def _search_modules(self, base_ap: float, past: list[dict[str, Any]]) -> Result:
        """Visit one module after the other."""
        units, order = self.units, self.schedule.order(self.bench.modules)
        replayed = read_events(past, "decision", Decision, self.journal.path)
        self.results.decisions += replayed
        with search_log.ProgressBar(list(self.bench.modules.values()), units, self.bench.method, bar_off()) as bar:
            for decision in replayed:
                bar.show(decision)

            def record(decision: Decision) -> None:
                self.results.decisions.append(decision)
                distributed.on_main(lambda: self.journal.decision(decision))
                self.board.add(search_log.decision_scalars(decision), len(self.results.decisions))
                bar.show(decision)
                if decision.accepted:
                    self.log.info("%s", search_log.module_line(decision))
                    left = order[decision.visit + 1 :]
                    if left and widths_after(self.full_widths, search.kept) != self.full_widths:
                        so_far = self.results.result(base_ap, decision.full_ap or 0.0, search.kept, self.model)
                        distributed.on_main(lambda: self.results.save(so_far, left))
                self.stop_if_asked()

            search = Search(self.bench, self.schedule, units, base_ap, record, replayed)
            kept = search.run()
        self.effort = search.effort
        return self.results.result(base_ap, search.ap, kept, self.model)

    def _search_globally(self, base_ap: float, past: list[dict[str, Any]]) -> Result:
        """Price all modules at once."""
        replayed = read_events(past, "trial", Trial, self.journal.path)
        search = GlobalSearch(
            self.options, self.model, self.bench, self.prices, base_ap, self.results, self.journal, self.board,
            replayed, self.past_layers, self.stop_if_asked,
        )  # fmt: skip
        self.effort = search.effort
        return search.run(self.schedule.fast_threshold_ap(base_ap))

    def _decoder_layers(self, result: Result) -> dict[str, Any]:
        """Return the numbers of decoder layers of a search that may drop some, for the journal and the summary."""
        if self.config.min_dec_layers is None:
            return {}
        return {"decoder_layers": {"before": len(self.full_widths.decoder), "after": len(result.widths.decoder)}}

    def _outcome(self, result: Result, passed: bool) -> dict[str, Any]:
        return {
            "passed": passed,
            "ap": result.ap,
            "widths": result.widths.to_list(),
            "images": self.setup.num_images,
            "image_size_hw": list(self.image_size_hw),
            **self._decoder_layers(result),
            **self.effort.so_far(),
            "passes_since_resume": self.bench.counter.to_dict(),
            "phases": self.clock.to_dict() if self.plan is None else self.plan.to_dict(self.clock),
        }
