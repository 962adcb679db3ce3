"""Detect objects in images: pictures with boxes, names and scores, and COCO results, of one detector or of two.

python inference.py photos/ more/*.jpg --resume CKPT --output_dir out
python inference.py "photos/**/*.png" --resume CKPT --names COCODIR/annotations/instances_val2017.json
python inference.py photos/ --compare CKPT out/pruned.pth --output_dir side_by_side
"""

import argparse
import os
from collections.abc import Collection

import torch

from tools.prediction import Prediction
from util import distributed
from util.cli import real, script_parser, whole
from util.errors import UserError, run_cli
from util.files import check_output_dir
from util.lock import hold_folder
from util.logging import log_to_file, stop_logging_to_file
from weights.options import (
    NETWORK_TITLE,
    add_device_options,
    add_folder_options,
    add_loader_options,
    add_network_options,
    add_output_options,
    add_padding_option,
    add_position_options,
    parse,
)


def get_inference_parser() -> argparse.ArgumentParser:
    """What to look at and how, and those options of `main.py` that say which network a checkpoint is of."""
    usage = "%(prog)s IMAGES [IMAGES ...] (--resume FILE | --compare DENSE SLIM) [options]"
    parser = script_parser(__doc__, usage=usage)
    run = parser.add_argument_group("run")
    add_folder_options(run)
    add_device_options(run, "mixed precision; --amp alone is bf16")
    add_loader_options(parser.add_argument_group("data"))
    network = parser.add_argument_group(NETWORK_TITLE)
    add_network_options(network)
    add_position_options(network)
    add_padding_option(network)
    add_output_options(network)
    group = parser.add_argument_group("images and pictures")
    add = group.add_argument
    add("inputs", type=os.path.expanduser, nargs="+", metavar="IMAGES",
        help="images, folders of images, or globs in quotes (** reaches deeper)")  # fmt: skip
    add("--compare", type=os.path.expanduser, nargs=2, metavar=("DENSE", "SLIM"), default=None,
        help="in place of --resume: checkpoints of two detectors, drawn side by side with milliseconds an image, the "
        "median of one image alone after a warm-up, the two taking turns")  # fmt: skip
    add("--score_threshold", type=real(0, at_most=1), default=0.3,
        help="least score that is drawn, in [0, 1]; results.json has all detections")  # fmt: skip
    add("--names", type=os.path.expanduser, metavar="FILE", default=None,
        help="COCO annotations with the names of the categories, by default those that the checkpoint tells; where "
        "they list all the images, results.json has their ids")  # fmt: skip
    add("--max_images", type=whole(1), default=None, help="first images to look at, by default all")
    return parser


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> None:
    """Detect and draw as the options of `get_inference_parser` say; files go to `args.output_dir`.

    Raises:
        UserError: a mistake in the options, before anything is written; or no image can be read.
    """
    torch.set_flush_denormal(True)
    if (args.resume is None) == (args.compare is None):
        found = "neither" if args.resume is None else "both"
        raise UserError(f"--resume, --compare: found {found}, expected one of them")
    if args.compare is not None and args.cfgs is not None:
        raise UserError("--cfgs: found --compare as well, where each checkpoint tells its own widths")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("inference.py runs in one process, found torchrun with more; expected python inference.py")
    device = distributed.choose_device(args.device)
    prediction = Prediction(args, typed, device, check_output_dir(args.output_dir))
    with hold_folder(prediction.output_dir):
        handler = log_to_file(prediction.output_dir / "run.log")
        try:
            prediction.run()
        finally:
            stop_logging_to_file(handler)


if __name__ == "__main__":
    run_cli(lambda: main(*parse(get_inference_parser())))
