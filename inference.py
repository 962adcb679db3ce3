"""Detect objects with one detector or two; write pictures with boxes, names and scores, and COCO results.

python inference.py photos/ more/*.jpg --resume CKPT --output_dir out
python inference.py "photos/**/*.png" --resume CKPT --names COCODIR/annotations/instances_val2017.json
python inference.py photos/ --compare CKPT out/pruned.pth --output_dir side_by_side
"""

import argparse
import logging
import os
import time
from collections.abc import Collection
from typing import Any

import torch

from runs.config import DeviceConfig
from runs.inference_plan import InferencePlanner, is_long_inference
from runs.plan import RunPlan
from tools.prediction import Prediction, PredictionOptions
from util import distributed
from util.cli import add_groups, add_options, options_from_python, parse, script_parser
from util.errors import UserError, run_cli
from util.files import check_output_dir
from util.lock import check_unlocked, hold_folder
from util.logging import Notice, get_logger, log_to_file, show, stop_logging_to_file
from util.phases import PhaseClock


def get_inference_parser() -> argparse.ArgumentParser:
    """Return the parser: options of inference, and those of `main.py` that describe a checkpoint's network."""
    parser = script_parser(__doc__, "IMAGES [IMAGES ...] (--resume FILE | --compare DENSE SLIM) [options]")
    add_options(parser.add_argument_group("run"), DeviceConfig)
    add_groups(parser, PredictionOptions)
    return parser


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> None:
    """Run inference with the options of `get_inference_parser`; write to `args.output_dir`, unless only planned.

    Raises:
        UserError: an option is wrong, raised before anything is written; or no image can be read.
    """
    torch.set_flush_denormal(True)
    run, options = DeviceConfig.from_values(vars(args)), PredictionOptions.from_values(vars(args))
    compare = options.prediction.compare
    if (run.resume is None) == (compare is None):
        found = "neither" if run.resume is None else "both"
        raise UserError(f"--resume, --compare: found {found}, expected one of them")
    if compare is not None and options.detector.cfgs is not None:
        raise UserError("--cfgs: found --compare as well, where each checkpoint has its own widths")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("inference.py: found several processes of torchrun, expected one: python inference.py")
    device = distributed.choose_device(run.device)
    prediction, began = Prediction(options, typed, run.resume, device, check_output_dir(run.output_dir)), time.time()
    if run.plan:
        check_unlocked(prediction.output_dir)
        show([_plan_notice(InferencePlanner(prediction).plan())])
        return
    with hold_folder(prediction.output_dir):
        plan = InferencePlanner(prediction).plan() if is_long_inference(prediction) else None
        notices = [] if plan is None else [_plan_notice(plan)]
        show(notices)
        handler = log_to_file(prediction.output_dir / "run.log", notices)
        try:
            with PhaseClock(torch.device("cpu")).running() as clock:  # each batch waits for its detections
                prediction.run()
            if plan is not None:
                get_logger().info("%s", plan.compared(clock, time.time() - began))
        finally:
            stop_logging_to_file(handler)


def _plan_notice(plan: RunPlan) -> Notice:
    return logging.INFO, plan.text()


def run(**options: Any) -> None:
    """Run inference from Python, with the options of the command line as keywords and `inputs` for the images."""
    main(*options_from_python(options, DeviceConfig, PredictionOptions))


if __name__ == "__main__":
    run_cli(lambda: main(*parse(get_inference_parser())))
