"""The command line that both searches share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Collection

import torch

from pruning.arguments import check_search_options, get_pruning_parser, schedule_of, settle_images
from pruning.schedule import Schedule
from runs.search_run import Result, SearchRun
from runs.training_state import seed_everything
from util import distributed
from util.errors import UserError, run_cli
from util.files import check_output_dir
from util.lock import hold_folder
from util.logging import get_logger, log_to_file, stop_logging_to_file
from weights.build import build_detector, settle_arguments
from weights.options import parse


def run(schedule: Schedule, doc: str) -> None:
    """An entry script's main: parse the command line and search; a user's mistake ends with exit code 2.

    `doc` is the script's docstring: what it does, and command lines as examples.
    """
    parser = get_pruning_parser(schedule, doc)
    run_cli(lambda: search(schedule, *parse(parser)))


def search(schedule: Schedule, args: argparse.Namespace, typed: Collection[str] = ()) -> Result:
    """Search by `schedule` with the options of `get_pruning_parser`; write the output to `args.output_dir`.

    Raises:
        UserError: before anything is written.
        RunFailedError: no width passed, or something is not finite.
    """
    torch.set_flush_denormal(True)
    check_search_options(args, typed)
    if args.resume is None:
        raise UserError("--resume: found none, expected the checkpoint of the detector to prune")
    device = distributed.choose_device(args.device)
    output_dir = check_output_dir(args.output_dir)
    settle_images(args)
    # Reading the checkpoint is the same as for an evaluation: no training goes on.
    args.eval, args.start_fresh = args.search_split == "val2017", True
    checkpoint, _ = settle_arguments(args, typed)
    schedule = schedule_of(schedule, args)
    distributed.start(device)
    seed_everything(args.seed)
    handler, lock = None, contextlib.ExitStack()
    try:
        lock.enter_context(hold_folder(output_dir))
        model, criterion, postprocessors = build_detector(args, checkpoint)
        run = SearchRun(schedule, args, model.to(device), output_dir, device)
        run.prepare(criterion.to(device), postprocessors["bbox"])
        base_ap = run.base_ap()
        # From here on the inputs are known to be good, and files are written.
        handler = log_to_file(output_dir / "run.log", run.notices)
        if checkpoint is not None and checkpoint.remark:
            run.log.info("%s", checkpoint.remark)
        if args.search == "fast" and "skip_eval_converge" in typed:
            get_logger().info("--skip_eval_converge: not used by --search fast, which has no subset of the images")
        return run.search(base_ap)
    finally:
        stop_logging_to_file(handler)
        lock.close()
        distributed.stop()
