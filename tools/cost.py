"""Print the parameters and multiply-accumulates of a dense detector and of one with given widths.

    python -m tools.cost --image-size 800 1088 --cfgs WIDTHS

See `pruning.cost` for the counting rules.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from models import build
from models.config import NETWORK_TITLE, DetectorConfig, NetworkConfig, refuse_unused_by_network
from pruning.cost import PAPER_IMAGE_SIZE_HW, cost_of, cost_table
from util.cli import add_options, parse, script_parser, whole
from util.errors import run_cli


def get_cost_parser() -> argparse.ArgumentParser:
    """Return the parser: the options of `main.py` that shape a network, and the image size."""
    parser = script_parser(__doc__, prog="python -m tools.cost")
    add_options(parser.add_argument_group(NETWORK_TITLE), NetworkConfig)
    parser.add_argument("--image-size", dest="image_size_hw", type=whole(1), nargs=2, default=PAPER_IMAGE_SIZE_HW,
                        metavar=("HEIGHT", "WIDTH"), help="image size in pixels")  # fmt: skip
    parser.add_argument("--num_classes", type=whole(1), default=91, help="largest category id + 1 (COCO: 91)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table.

    Raises:
        UserError: widths do not fit the network, or an option has no effect on the cost.
    """
    args, typed = parse(get_cost_parser(), argv)
    config = DetectorConfig.from_values(vars(args))
    refuse_unused_by_network(config, typed)
    height, width = args.image_size_hw
    costs = []
    for name, cfgs in [("dense", None), *([("--cfgs", config.cfgs)] if config.cfgs else [])]:
        with torch.device("meta"):
            model, _, _ = build(dataclasses.replace(config, cfgs=cfgs))
        costs.append((name, cost_of(model, (height, width))))
    print(f"{args.num_classes} classes, {args.backbone}, {args.num_queries} queries, one image of {height} x {width}")
    print(cost_table(costs))


if __name__ == "__main__":
    run_cli(main)
