"""Compare AP and time of detectors in INT8 with those in float32 and bfloat16.

    python -m bench.int8 --coco_path output/demo_set --detector dense checkpoints/demo.pth \\
        --detector "half of the MACs" out/pruned.pth --output bench/results/int8_demo.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from export import ExportOptions
from tools.export_formats import GraphForm, require_packages
from tools.export_int8 import CALIBRATION_IMAGES, EVALUATED_IMAGES, Int8Result, export_int8
from tools.export_report import int8_table
from tools.export_timing import onnx_of
from util.cli import script_parser, user_path, whole
from util.environment import environment
from util.errors import run_cli
from util.files import write_json
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint


def measure(checkpoint_path: str, coco_path: str, calibration_images: int, images: int) -> Int8Result:
    """Quantise the detector of a checkpoint; see `tools.export_int8.export_int8`."""
    checkpoint = read_checkpoint(checkpoint_path)
    given = ExportOptions.from_values({"coco_path": coco_path, "num_workers": 0})
    options = options_for(given, checkpoint, {"coco_path", "num_workers"})
    model, _, postprocessors = build_detector(options.detector, checkpoint)
    short = options.data.image_size
    data = onnx_of(model.eval(), (short, short * 4 // 3), GraphForm(with_mask=False))
    return export_int8(
        data, model, postprocessors["bbox"], options.data, None,
        with_mask=False, calibration_images=calibration_images, images=images,
    )  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.int8")
    add = parser.add_argument
    add("--coco_path", required=True, help="data set")
    add("--detector", nargs=2, action="append", required=True, metavar=("NAME", "CHECKPOINT"),
        help="a row's name and its checkpoint, repeatable")  # fmt: skip
    add("--calibration_images", type=whole(1), default=CALIBRATION_IMAGES, help="of train2017, at most")
    add("--images", type=whole(1), default=EVALUATED_IMAGES, help="of val2017 for AP, at most")
    add("--output", type=user_path, required=True, help="JSON file for the figures")
    return parser


def main() -> None:
    """Measure each detector, print its table and write the figures."""
    args = get_parser().parse_args()
    require_packages(["onnx"])
    torch.set_flush_denormal(True)
    detectors: list[dict[str, Any]] = []
    for name, path in args.detector:
        found = measure(path, args.coco_path, args.calibration_images, args.images)
        print(f"{name}\n{int8_table(found)}")
        detectors.append({"name": name, **found.figures})
    write_json(args.output, {"environment": environment(), "detectors": detectors})


if __name__ == "__main__":
    run_cli(main)
