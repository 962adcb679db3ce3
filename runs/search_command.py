"""Command line of both search scripts."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Collection
from typing import Any

import torch

from datasets.config import DataConfig
from models.config import NETWORK_TITLE, DetectorConfig, LossConfig
from pruning.checks import check_prunable
from pruning.config import MethodConfig, PrecisionConfig, StepConfig, TargetConfig, refuse_unused_by_search
from pruning.schedule import Schedule
from runs.config import LogConfig, RunConfig, SearchOptions
from runs.fewer_queries import keep_best_queries
from runs.past_training import PastTraining
from runs.resolve_options import resolve_search
from runs.search_plan import is_long_search
from runs.search_results import Result
from runs.search_run import SearchRun
from runs.training_state import seed_everything
from util import distributed
from util.cli import add_options, parse, script_parser
from util.errors import run_cli
from util.files import check_output_dir
from util.lock import check_unlocked, hold_folder
from util.logging import get_logger, log_to_file, stop_logging_to_file
from weights.build import build_detector


def get_pruning_parser(schedule: Schedule, doc: str) -> argparse.ArgumentParser:
    """Return the parser of a search, with the schedule's values as defaults; `doc` is the script's docstring."""
    parser = script_parser(doc)
    run = parser.add_argument_group("run")
    add_options(run, RunConfig)
    add_options(run, PrecisionConfig)
    add_options(parser.add_argument_group("data"), DataConfig)
    add_options(parser.add_argument_group("log"), LogConfig)
    add_options(parser.add_argument_group(NETWORK_TITLE), DetectorConfig)
    add_options(parser.add_argument_group("losses that channels are ranked by"), LossConfig)
    add_options(parser.add_argument_group("targets"), TargetConfig, **defaults_of(schedule))
    add_options(parser.add_argument_group("choice and reconstruction of channels"), MethodConfig)
    add_options(parser.add_argument_group("search"), StepConfig)
    return parser


def defaults_of(schedule: Schedule) -> dict[str, Any]:
    """Return the schedule's own values of the options of `TargetConfig`."""
    return {
        "map_tol": schedule.map_tol,
        "skip_eval_converge": schedule.skip,
        "decay_points": schedule.points_per_module,
        "decay_fraction": schedule.fraction_per_module,
    }


def run_script(schedule: Schedule, doc: str) -> None:
    """Parse the command line and search; a user's error ends with exit code 2.

    `doc` is the script's docstring: a description and example commands.
    """
    parser = get_pruning_parser(schedule, doc)
    run_cli(lambda: search(schedule, *parse(parser)))


def search(schedule: Schedule, args: argparse.Namespace, typed: Collection[str] = ()) -> Result | None:
    """Search by `schedule` with the options of `get_pruning_parser`; write the output to `output_dir`.

    With --plan, only print what the search will take, and return None.

    Raises:
        UserError: options, checkpoint or data are wrong; raised before anything is written.
        RunFailedError: no trial passed, or a value is not finite.
    """
    torch.set_flush_denormal(True)
    options = SearchOptions.from_values({**defaults_of(schedule), **vars(args)})
    refuse_unused_by_search(options.search, typed)
    device = distributed.choose_device(options.run.device)
    output_dir = check_output_dir(options.run.output_dir)
    options, checkpoint = resolve_search(options, typed)
    schedule = options.search.schedule(schedule)
    distributed.start(device)
    seed_everything(options.run.seed)
    handler, lock = None, contextlib.ExitStack()
    try:
        if options.run.plan:
            check_unlocked(output_dir)
        else:
            lock.enter_context(hold_folder(output_dir))
        model, criterion, postprocessors = build_detector(options.detector, checkpoint, options.losses)
        check_prunable(model, options.search.scope, options.run.resume)
        images = options.search.search_images
        options, kept_queries = keep_best_queries(
            options, (model, criterion, postprocessors), device, chosen_on=options.search.split,
            measured_on=options.search.split, amp=options.search.eval_amp,
            num_images=images if isinstance(images, int) else None,
        )  # fmt: skip
        run = SearchRun(schedule, options, model.to(device), output_dir, device, kept_queries)
        run.results.past_training = PastTraining.of(checkpoint.arguments)
        run.prepare(criterion.to(device), postprocessors["bbox"])
        if options.run.plan or is_long_search(run.setup):
            run.estimate()
        if options.run.plan:
            return None
        lock.enter_context(run.clock.running())
        run.cache_features()
        base_ap = run.base_ap()
        # The inputs are valid; files are written from here on.
        handler = log_to_file(output_dir / "run.log", run.notices)
        if checkpoint.remark:
            run.log.info("%s", checkpoint.remark)
        if options.search.search == "fast" and "skip_eval_converge" in typed:
            get_logger().info("--skip_eval_converge: not used by --search fast, which evaluates on no subset")
        return run.search(base_ap)
    finally:
        stop_logging_to_file(handler)
        lock.close()
        distributed.stop()
