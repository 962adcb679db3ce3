"""Run all scripts on the built-in demo set: evaluate, prune the transformer or all, transplant, fine-tune, evaluate.

    python -m bench.demo --output output/demo

The folder --output gets the data set, a folder for each script, summary.json, widths.png, ap_params.png and
detections.png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from datasets.coco import CocoDataset, build_dataset
from main import get_args_parser
from runs.config import TrainingOptions
from runs.resolve_options import resolve_training
from tools.draw import draw_detections, write_grid
from util.cli import parse, script_parser, user_path, whole
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import copy_file, write_json
from util.lock import hold_folder
from util.logging import table
from util.timing import milliseconds_per_image
from weights.build import build_detector

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "demo.pth"
ROWS = {
    "dense": "dense",
    "transformer": "transformer pruned",
    "detector": "whole detector pruned",
    "fine-tuned": "whole detector pruned, fine-tuned",
}
PICTURES = 6

T = TypeVar("T")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the demo's options, whose defaults keep it within minutes."""
    parser = script_parser(__doc__, prog="python -m bench.demo")
    add = parser.add_argument
    add("--output", type=user_path, default=Path("output/demo"), help="folder for all results")
    add("--checkpoint", type=user_path, default=CHECKPOINT, help="detector to prune")
    add("--images", type=whole(1), default=1000, help="training images to draw")
    add("--val_images", type=whole(1), default=400, help="validation images to draw")
    add("--seed", type=whole(0), default=42, help="seed of the drawn images")
    add("--epochs", type=whole(1), default=3, help="epochs of fine-tuning")
    return parser


def stages(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Return the title and command of each stage."""
    data, output = str(args.output / "data"), args.output
    drawn = ["--images", str(args.images), "--val-images", str(args.val_images), "--seed", str(args.seed)]
    search = ["--search_split", "train2017", "--search_images", "400", "--batch_size", "16", "--attention_unit", "2"]
    of_detector = ["--scope", "detector", "--keep", "0.6", "--calibration_images", "256"]
    # The backbone was cut, too, so it learns at the full rate.
    training = ["--epochs", str(args.epochs), "--batch_size", "16", "--lr", "1e-4", "--lr_backbone", "1e-4"]
    training += ["--lr_schedule", "cosine", "--warmup_iters", "20", "--ema_decay", "0.98", "--augmentation", "flip"]
    training += ["--cls_loss_coef", "2", "--label_noise_scale", "1", "--cache_images", "--num_workers", "0"]
    training += ["--distill", str(args.checkpoint)]
    return [
        ("draw the demo set", ["-m", "datasets.demo", data, *drawn]),
        ("evaluate the dense detector", _main(output / "dense", data, args.checkpoint, "--eval")),
        (
            "search: how few channels does each layer of the transformer need?",
            _script("prune_greedy_ad.py", output / "search", data, args.checkpoint, *search, "--map_tol", "0.02"),
        ),
        (
            "evaluate the pruned transformer",
            _main(output / "transformer", data, output / "search" / "pruned.pth", "--eval"),
        ),
        (
            "search: the whole detector at 60 % of its multiply-accumulates",
            _script("prune_greedy_ad.py", output / "search_detector", data, args.checkpoint, *search, *of_detector),
        ),
        (
            "evaluate the pruned detector",
            _main(output / "detector", data, output / "search_detector" / "pruned.pth", "--eval"),
        ),
        (
            "transplant and fine-tune",
            _main(output / "training", data, output / "search_detector" / "pruned.pth", *training),
        ),
        (
            "evaluate the fine-tuned detector",
            _main(output / "fine-tuned", data, output / "training" / "checkpoint.pth", "--eval"),
        ),
    ]


def _script(name: str, output: Path, data: str, checkpoint: Path, *options: str) -> list[str]:
    return [name, "--output_dir", str(output), "--coco_path", data, "--resume", str(checkpoint), *options]


def _main(output: Path, data: str, checkpoint: Path, *options: str) -> list[str]:
    return _script("main.py", output, data, checkpoint, *options)


def run_stages(args: argparse.Namespace) -> None:
    """Run each stage in a process; the first failure ends the demo with the exit code of that stage."""
    todo = stages(args)
    for number, (title, command) in enumerate(todo, start=1):
        print(f"\n[{number}/{len(todo)}] {title}\n$ python {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            sys.exit(code)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def load_detector(checkpoint: Path, coco_path: Path) -> tuple[nn.Module, object, TrainingOptions]:
    """Build the model in eval mode, its postprocessor and its options, as `main.py --eval` does."""
    args, typed = parse(
        argparse.ArgumentParser(parents=[get_args_parser()]),
        ["--coco_path", str(coco_path), "--resume", str(checkpoint), "--eval"],
    )
    options, read, _ = resolve_training(TrainingOptions.from_values(vars(args)), typed)
    model, _, postprocessors = build_detector(options.detector, read)
    return model.eval(), postprocessors["bbox"], options


def summarise(output: Path, checkpoint: Path) -> list[dict]:
    """Return the rows of the table from the evaluations' files, with timings; write the pictures."""
    paths = {
        "dense": checkpoint,
        "transformer": output / "search" / "pruned.pth",
        "detector": output / "search_detector" / "pruned.pth",
        "fine-tuned": output / "training" / "checkpoint.pth",
    }
    detectors = {name: load_detector(path, output / "data") for name, path in paths.items()}
    models = {name: model for name, (model, _, _) in detectors.items()}
    dataset = build_dataset("val2017", detectors["dense"][2].data)
    images = [dataset[index][0] for index in range(min(20, len(dataset)))]
    times = milliseconds_per_image(models, images)
    rows = []
    for name, title in ROWS.items():
        found = json.loads((output / name / "eval.json").read_text())
        rows.append(
            {
                "name": title,
                "ap": found["AP"],
                "ap50": found["AP50"],
                "transformer_params": found["transformer_params"],
                "params": found["params"],
                "gmacs": found["gmacs"],
                "detector_gmacs": found["detector_gmacs"],
                "ms_per_image": times[name],
                "widths": found["widths"],
            }
        )
    copy_file(output / "search_detector" / "widths.png", output / "widths.png")
    copy_file(output / "search" / "ap_params.png", output / "ap_params.png")  # against the transformer's parameters
    _write_detections(output, dataset, {name: detectors[name] for name in ("dense", "fine-tuned")})
    return rows


@torch.no_grad()
def _write_detections(output: Path, dataset: CocoDataset, detectors: dict) -> None:
    """Write detections.png: validation images with the boxes of each detector, side by side."""
    # Prefer the images with most objects; ties keep file order.
    busiest = sorted(range(len(dataset)), key=lambda index: -len(dataset[index][1]["labels"]))
    columns = []
    for name, (model, postprocess, options) in detectors.items():
        pictures = []
        for index in spread(busiest, PICTURES):
            image, target = dataset[index]
            result = postprocess(model([image]), target["orig_size"][None])[0]
            names = options.detector.categories
            pictures.append(draw_detections(dataset.picture(index), result, names, threshold=0.4, scale=2))
        columns.append((ROWS[name], pictures))
    write_grid(output / "detections.png", fold_columns(columns))


def spread(indices: Sequence[int], count: int) -> Sequence[int]:
    """Pick up to `count` of the indices, at most 8 apart, so that the number of objects varies."""
    step = max(1, min(8, len(indices) // count))
    return indices[::step][:count]


def fold_columns(columns: Sequence[tuple[str, Sequence[T]]]) -> list[tuple[str, Sequence[T]]]:
    """Put the lower halves of all columns beside the upper halves, so that the sheet is wider than high."""
    half = -(-max(len(pictures) for _, pictures in columns) // 2)
    halves = [(title, pictures[start : start + half]) for start in (0, half) for title, pictures in columns]
    return [(title, pictures) for title, pictures in halves if pictures]


def main() -> None:
    """Run the demo and print its table."""
    torch.set_flush_denormal(True)
    args = get_parser().parse_args()
    if not args.checkpoint.is_file():
        raise UserError(f"--checkpoint {args.checkpoint}: found no such file, expected a detector's checkpoint")
    start = time.perf_counter()
    with hold_folder(args.output, "--output"):
        run_stages(args)
        rows = summarise(args.output, args.checkpoint)
        seconds = round(time.perf_counter() - start)
        write_json(args.output / "summary.json", {"environment": environment(), "seconds": seconds, "rows": rows})
    keys = ("name", "ap", "ap50", "transformer_params", "params", "gmacs", "detector_gmacs", "ms_per_image")
    titles = ("", "AP", "AP50", "transformer parameters", "all parameters", "GMACs", "detector GMACs", "ms an image")
    cells = [[f"{row[k]:,}" if isinstance(row[k], int) else row[k] for k in keys] for row in rows]
    print(f"\n{table(titles, cells)}\n\nwidths: --cfgs '{json.dumps(rows[-1]['widths'])}'")
    for name in ("summary.json", "widths.png", "ap_params.png", "detections.png"):
        print(args.output / name)
    print(f"{seconds} s in total")


if __name__ == "__main__":
    run_cli(main)
