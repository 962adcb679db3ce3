"""Detect objects with one detector or two; write pictures with boxes, names and scores, and COCO results.

python inference.py photos/ more/*.jpg --resume CKPT --output_dir out
python inference.py "photos/**/*.png" --resume CKPT --names COCODIR/annotations/instances_val2017.json
python inference.py photos/ --compare CKPT out/pruned.pth --output_dir side_by_side
"""

import argparse
import os
from collections.abc import Collection
from typing import Any

import torch

from runs.config import DeviceConfig
from tools.prediction import Prediction, PredictionOptions
from util import distributed
from util.cli import add_groups, add_options, options_from_python, parse, script_parser
from util.errors import UserError, run_cli
from util.files import check_output_dir
from util.lock import hold_folder
from util.logging import log_to_file, stop_logging_to_file


def get_inference_parser() -> argparse.ArgumentParser:
    """Return the parser: options of inference, and those of `main.py` that describe a checkpoint's network."""
    parser = script_parser(__doc__, "IMAGES [IMAGES ...] (--resume FILE | --compare DENSE SLIM) [options]")
    add_options(parser.add_argument_group("run"), DeviceConfig)
    add_groups(parser, PredictionOptions)
    return parser


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> None:
    """Run inference with the options of `get_inference_parser`; write the files to `args.output_dir`.

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
    prediction = Prediction(options, typed, run.resume, device, check_output_dir(run.output_dir))
    with hold_folder(prediction.output_dir):
        handler = log_to_file(prediction.output_dir / "run.log")
        try:
            prediction.run()
        finally:
            stop_logging_to_file(handler)


def run(**options: Any) -> None:
    """Run inference from Python, with the options of the command line as keywords and `inputs` for the images."""
    main(*options_from_python(options, DeviceConfig, PredictionOptions))


if __name__ == "__main__":
    run_cli(lambda: main(*parse(get_inference_parser())))
