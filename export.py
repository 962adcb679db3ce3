"""Export a detector to ONNX and torch.export, and check both files against the detector.

    python export.py --resume CKPT --output_dir out
    python export.py --resume out/pruned.pth --output_dir out --format onnx --detections --image_size_hw 480 640

The files are OUT/NAME.onnx and OUT/NAME.pt2, named after the checkpoint. Inputs: `images` B x 3 x H x W (float32, RGB
in [0, 1], normalised by the mean and std in the metadata) and `mask` B x H x W (bool, True on padding; --no-mask omits
it, which is faster if no image is padded). Outputs: `pred_logits` B x Q x C (one sigmoid per class) and `pred_boxes`
B x Q x 4 (centre x, centre y, width, height, in [0, 1] of the unpadded image). Batch, height and width are dynamic.
Images of one size give the boxes of `main.py` and `inference.py`; the boxes of padded images differ slightly, because
the convolutions see the padding.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets.config import LoaderConfig
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.config import NETWORK_TITLE, DetectorConfig
from runs.config import FolderConfig
from tools.export_check import BATCH_SIZES, TOLERANCE
from tools.export_formats import (
    FORMATS,
    GREATEST_OPSET,
    GREATEST_SIDE,
    LEAST_OPSET,
    ExportResult,
    export,
    require_packages,
)
from util.cli import Config, add_groups, group, option, options_from_python, parse, refuse, script_parser, whole
from util.errors import UserError, run_cli
from util.files import check_output_dir
from util.lock import hold_folder
from util.logging import bar_off, get_logger, table
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint
from weights.decoder_layers import with_typed_layers
from weights.formats import Checkpoint
from weights.huggingface import INDEX_SUFFIX


@dataclass(frozen=True)
class ExportConfig(Config):
    """Options of an export and its check."""

    format: Sequence[str] = option(FORMATS, "formats to write", nargs="+", choices=FORMATS, stored="run")
    image_size_hw: Sequence[Sequence[int]] | None = option(None, type=whole(1, at_most=GREATEST_SIDE), nargs=2,
        action="append", metavar=("HEIGHT", "WIDTH"), stored="run", help="image size in pixels for the check, "
        "repeatable; by default the checkpoint's image size by 4/3 of it, and 3/4 of it square; sides up to "
        f"{GREATEST_SIDE}")  # fmt: skip
    opset: int = option(LEAST_OPSET, type=whole(LEAST_OPSET, at_most=GREATEST_OPSET), help="ONNX opset, up "
        f"to {GREATEST_OPSET}")  # fmt: skip
    mask: bool = option(True, "add the padding mask as a second input")
    detections: bool = option(False, help="also output the --num_select best pairs of query and class per image, "
        "best first: scores, labels (category ids) and boxes (x0, y0, x1, y1 in [0, 1] of the image)")  # fmt: skip


@dataclass(frozen=True)
class ExportOptions(Config):
    """All options of export.py; the image size comes from the checkpoint."""

    run: FolderConfig = group(FolderConfig, "run")
    detector: DetectorConfig = group(DetectorConfig, NETWORK_TITLE)
    loader: LoaderConfig = group(LoaderConfig, None)
    export: ExportConfig = group(ExportConfig, "export")


def get_export_parser() -> argparse.ArgumentParser:
    """Return the parser: options of an export, and those of `main.py` that describe a checkpoint's network."""
    parser = script_parser(__doc__)
    add_groups(parser, ExportOptions)
    return parser


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> list[ExportResult]:
    """Export with the options of `get_export_parser`; print a table of files and differences.

    Raises:
        UserError: options and checkpoint do not agree, or a package is missing.
        SystemExit: with code 1, if the outputs of a file differ from the detector's; the file is removed.
    """
    torch.set_flush_denormal(True)
    options = ExportOptions.from_values(vars(args))
    asked, run = options.export, options.run
    if not asked.detections:
        refuse(["num_select"], typed, "found no --detections, without which it is not used")
    if "onnx" not in asked.format:
        refuse(["opset"], typed, f"found --format {' '.join(asked.format)}, expected onnx, which alone uses it")
    if not run.resume:
        raise UserError("--resume: found none, expected the checkpoint of the detector to export")
    require_packages(asked.format)
    output_dir = check_output_dir(run.output_dir)
    checkpoint = with_typed_layers(read_checkpoint(run.resume), options.detector, typed)
    if checkpoint.remark:
        get_logger().info("%s", checkpoint.remark)
    options = options_for(options, checkpoint, typed)
    model, _, postprocessors = build_detector(options.detector, checkpoint)
    short = options.loader.image_size
    sizes_hw = [tuple(size) for size in asked.image_size_hw or ((short, short * 4 // 3), (short * 3 // 4,) * 2)]
    name = f"{Path(checkpoint.path.name.removesuffix(INDEX_SUFFIX)).stem}.{{}}"
    paths = {format_: output_dir / name.format(format_) for format_ in FORMATS if format_ in asked.format}
    steps = 1 + len(paths) * (2 + len(sizes_hw) * len(BATCH_SIZES))
    with hold_folder(output_dir), tqdm(total=steps, disable=bar_off(), leave=False) as bar:

        def show(stage: str) -> None:
            bar.set_description(stage, refresh=False)
            bar.update()

        results = export(
            model,
            postprocessors["bbox"],
            paths,
            sizes_hw,
            opset=asked.opset,
            with_mask=asked.mask,
            with_detections=asked.detections,
            metadata=metadata_of(options, model, checkpoint),
            progress=show,
        )
    get_logger().info("%s", results_table(results))
    failed = [str(result.path) for result in results if not result.passed]
    if failed:
        sys.exit(f"error: {', '.join(failed)}: found a difference above {TOLERANCE:g}; not written")
    return results


def run(**options: Any) -> list[ExportResult]:
    """Export from Python, with the options of the command line as keywords; return and raise as `main`."""
    return main(*options_from_python(options, ExportOptions))


def metadata_of(options: ExportOptions, model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Metadata of the files, each a text or JSON."""
    names = checkpoint.categories
    return {
        **({"class_names": json.dumps(names)} if names else {}),
        "model": options.detector.modelname,
        "checkpoint": checkpoint.path.name,
        "num_classes": str(options.detector.num_classes),
        "widths": json.dumps(model.widths.to_list()),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "mask": "True on padding" if options.export.mask else "none",
    }


def results_table(results: list[ExportResult]) -> str:
    """Return a table with a row per file: its opset, then the greatest absolute differences of any output."""
    cases = results[0].cases
    header = ["file", "MB", "opset", *(f"{c.batch_size} x {c.size_hw[0]} x {c.size_hw[1]}" for c in cases), ""]
    rows = [
        [
            result.path,
            f"{result.megabytes:.1f}",
            result.opset or "-",
            *(f"{case.difference:.1e}" for case in result.cases),
            "ok" if result.passed else "FAILED",
        ]
        for result in results
    ]
    return (
        f"{table(header, rows)}\ngreatest difference from PyTorch for images x height x width; tolerance {TOLERANCE:g}"
    )


if __name__ == "__main__":
    command_line = get_export_parser()
    run_cli(lambda: main(*parse(command_line)) and None)
