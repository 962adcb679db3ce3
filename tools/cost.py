"""Print the parameters and multiply-accumulates of a dense detector and of one with given widths.

    python -m tools.cost --image-size 800 1088 --cfgs WIDTHS

`pruning.cost` says what is counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from models import build_model
from models.widths import Widths
from pruning.cost import PAPER_IMAGE_SIZE_HW, Cost, cost_of, cost_table
from util.cli import script_parser, whole
from util.errors import run_cli
from weights.options import NETWORK_TITLE, add_network_options, parse
from weights.stored_options import take_from_command_line
from weights.unread import refuse_unread


def get_parser() -> argparse.ArgumentParser:
    """The options of `main.py` (those that shape a network) and the size of the image."""
    parser = script_parser(__doc__, prog="python -m tools.cost")
    add_network_options(parser.add_argument_group(NETWORK_TITLE))
    parser.add_argument("--image-size", dest="image_size_hw", type=whole(1), nargs=2, default=PAPER_IMAGE_SIZE_HW,
                        metavar=("HEIGHT", "WIDTH"), help="pixels of the one image counted for")  # fmt: skip
    parser.add_argument("--num_classes", type=whole(1), default=91, help="largest category id + 1 (COCO: 91)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table.

    Raises:
        UserError: widths that do not fit the network, or an option that changes no figure.
    """
    args, typed = parse(get_parser(), argv)
    refuse_unread(args, typed)
    args.pretrained_backbone = False
    take_from_command_line(args)
    costs = [("dense", _cost_of_args(args, None))]
    if args.cfgs is not None:
        costs.append(("--cfgs", _cost_of_args(args, args.cfgs)))
    height, width = args.image_size_hw
    print(f"{args.num_classes} classes, {args.backbone}, {args.num_queries} queries, one image of {height} x {width}")
    print(cost_table(costs))


def _cost_of_args(args: argparse.Namespace, widths: Widths | None) -> Cost:
    with torch.device("meta"):
        model, _, _ = build_model(argparse.Namespace(**{**vars(args), "cfgs": widths}))
    height, width = args.image_size_hw
    return cost_of(model, (height, width))


if __name__ == "__main__":
    run_cli(main)
