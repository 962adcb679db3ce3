"""Measure how a fast search grows with images, image size, layers and processes.

    python -m bench.growth --coco_path COCODIR --checkpoint checkpoints/demo.pth --work output/growth

Runs `prune_greedy_ad.py --search fast --keep 0.5` several times, one setting changed in each series, and writes CPU
seconds of each phase and peak memory to growth.json and growth.png. The layers are those of detectors with random
weights, which try one power instead of three. Figures are written as they come; a second call with the same --work and
program measures only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.coco_scale import events_of, search_stage
from bench.watched_run import watch
from models import build
from models.config import DetectorConfig
from reports.plots import new_figure, save_figure
from util.cli import parse, script_parser, user_path, whole
from util.environment import environment, program_commit
from util.errors import UserError, run_cli
from util.files import file_digest, write_json
from util.logging import table
from weights.build import options_for
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.strip_optimizer import LOCAL_ARGUMENTS

NAME = "growth"
IMAGES, PIXELS, LAYERS, PROCESSES = "images", "pixels", "layers", "processes"
SERIES = {
    IMAGES: "images of the search, 128 of them to calibrate",
    PIXELS: "pixels of an image",
    LAYERS: "layers of encoder and decoder together",
    PROCESSES: "1 / processes; seconds of the busiest",
}
TITLES = ("", "", "images", "CPU seconds", "of the busiest process", "GB", "trials")


@dataclasses.dataclass(frozen=True)
class Point:
    """One search.

    Attributes:
        series: one of `SERIES`.
        value: what is varied: images, pixels, layers or processes.
        images: of the search.
        image_size: short side in pixels.
        layers: of the encoder and of the decoder; None for the checkpoint.
        processes: of torchrun; 1 starts the script itself.
    """

    series: str
    value: int
    images: int
    image_size: int
    layers: int | None = None
    processes: int = 1


def points(args: argparse.Namespace) -> list[Point]:
    """Return the searches of all series."""
    few, size = args.few_images, args.image_size
    found = [Point(IMAGES, images, images, size) for images in args.images]
    found += [Point(PIXELS, side * side, few, side) for side in args.image_sizes]
    found += [Point(LAYERS, 2 * layers, few, size, layers) for layers in args.layers]
    found += [Point(PROCESSES, number, few, size, None, number) for number in args.processes]
    return [point for point in found if point.series in args.series]


class Growth:
    """The searches and their figures.

    Attributes:
        figures: what is written to the results.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the figures of an earlier call with the same settings."""
        self.args = args
        args.work.mkdir(parents=True, exist_ok=True)
        self.path = args.output / f"{NAME}.json"
        settings = {
            "checkpoint": file_digest(args.checkpoint), "batch_size": args.batch_size, "few_images": args.few_images,
            "image_size": args.image_size, "commit": program_commit(),
        }  # fmt: skip
        self.figures: dict[str, Any] = {"settings": settings, "environment": environment(), "points": []}
        made = self.figures["environment"]
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if before.get("settings") == settings and before["environment"] | {"date": made["date"]} == made:
            self.figures["points"] = before["points"]

    def measure(self, point: Point) -> None:
        """Run one search, --rounds times, unless its figures are there.

        Raises:
            UserError: it failed.
        """
        what = {**dataclasses.asdict(point), "rounds": self.args.rounds}
        if any(what.items() <= found.items() for found in self.figures["points"]):
            return
        runs = [self._run(point) for _ in range(self.args.rounds)]
        best = min(runs, key=lambda run: run["busiest_cpu_seconds"])
        self.figures["points"].append({**what, **best})
        write_json(self.path, self.figures)
        print(
            f"{point.series} {point.value:,}: {best['cpu_seconds']:.1f} CPU s, {best['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )

    def _run(self, point: Point) -> dict[str, Any]:
        """Run one search; return its figures."""
        args, folder = self.args, self.args.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint = args.checkpoint
        if point.layers is not None:
            checkpoint = args.work / f"layers_{point.layers}.pth"
            write_layers(args.checkpoint, checkpoint, point.layers)
        launcher = [] if point.processes == 1 else [
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(point.processes),
        ]  # fmt: skip
        words = [
            *launcher, "prune_greedy_ad.py", "--search", "fast", "--keep", "0.5", "--coco_path", str(args.coco_path),
            "--resume", str(checkpoint), "--output_dir", str(folder), "--search_images", str(point.images),
            "--search_split", "train2017", "--image_size", str(point.image_size), "--batch_size", str(args.batch_size),
            "--num_workers", "0", "--device", "cpu",
        ]  # fmt: skip
        log = args.work / "run.log"
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        run = watch(words, log, functools.partial(search_stage, folder), variables=threads)
        if run.code != 0:
            raise UserError(f"{point.series} {point.value:,}: ended with exit code {run.code}, see {log}")
        *lines, end = events_of(folder)
        # Phases are timed by the clock; the share of the CPU is that of the run.
        share = run.cpu_seconds / run.seconds / point.processes
        phases = {phase["phase"]: round(share * phase["seconds"], 3) for phase in end["phases"]}
        return {
            "cpu_seconds": round(run.cpu_seconds, 3), "seconds": round(run.seconds, 3),
            "busiest_cpu_seconds": round(run.busiest_cpu_seconds, 3), "phases": phases,
            "peak_bytes": run.peak_bytes,
            "trials": sum(line["event"] == "trial" for line in lines),
        }  # fmt: skip


def write_layers(source: Path, path: Path, layers: int) -> None:
    """Write a detector like `source` with random weights and so many encoder and decoder layers."""
    checkpoint = read_checkpoint(source)
    options = dataclasses.replace(
        options_for(DetectorConfig(), checkpoint), enc_layers=layers, dec_layers=layers, cfgs=None
    )
    torch.manual_seed(0)
    model = build(options)[0]
    settings = {name: value for name, value in checkpoint.arguments.items() if name not in LOCAL_ARGUMENTS}
    settings |= {"enc_layers": layers, "dec_layers": layers}
    save_checkpoint(path, state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=settings, num_classes=checkpoint.num_classes)  # fmt: skip


def line_through(found: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float, float]:
    """Return constant and slope of the least squares line through a series, and its largest distance from a point.

    The distance is a share of the largest value. Processes divide the work, so their line is one in 1 / processes.
    """
    x, y = (np.array([values(point, name)[axis] for point in found]) for axis in (0, 1))
    slope, constant = np.polyfit(x, y, 1)
    return float(constant), float(slope), float(abs(constant + slope * x - y).max() / y.max())


def values(point: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Return a point of the plot: what is varied, and `seconds` (CPU) or `gigabytes`."""
    is_divided = point["series"] == PROCESSES
    seconds = point["busiest_cpu_seconds" if is_divided else "cpu_seconds"]
    x = 1 / point["value"] if is_divided else float(point["value"])
    return x, seconds if name == "seconds" else point["peak_bytes"] / 1e9


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw CPU seconds and memory of each series of two points or more, with straight lines through them."""
    series = [name for name in SERIES if sum(point["series"] == name for point in figures["points"]) > 1]
    if not series:
        return
    figure = new_figure(4 * len(series), 7)
    for column, name in enumerate(series):
        found = [point for point in figures["points"] if point["series"] == name]
        for row, (quantity, label) in enumerate({"seconds": "CPU seconds", "gigabytes": "GB"}.items()):
            axes = figure.add_subplot(2, len(series), row * len(series) + column + 1)
            constant, slope, distance = line_through(found, quantity)
            x, y = zip(*sorted(values(point, quantity) for point in found), strict=True)
            axes.plot(x, [constant + slope * value for value in x], color="#aaaaaa",
                      label=f"line, within {math.ceil(100 * distance)} %")  # fmt: skip
            axes.plot(x, y, "o", color="black", label="whole run" if quantity == "seconds" else "largest process")
            if quantity == "seconds" and name != PROCESSES:
                for phase in dict.fromkeys(phase for point in found for phase in point["phases"]):
                    of_phase = sorted((point["value"], point["phases"].get(phase, 0.0)) for point in found)
                    axes.plot(*zip(*of_phase, strict=True), ".-", linewidth=1, label=phase)
            axes.set_xlabel(SERIES[name])
            axes.set_ylabel(label)
            axes.set_ylim(0, 1.1 * max(y))
            axes.legend(fontsize=7)
    save_figure(figure, path)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.growth")
    add = parser.add_argument
    add("--coco_path", type=user_path, required=True, help="data set in COCO's layout")
    add("--checkpoint", type=user_path, required=True, help="dense detector to prune")
    add("--work", type=user_path, required=True, help="folder for the runs and their logs")
    add("--output", type=user_path, default=Path("bench/results"), help="folder for the figures")
    add("--series", nargs="+", choices=tuple(SERIES), default=list(SERIES), help="what to vary")
    add("--images", type=whole(1), nargs="+", default=[128, 256, 500, 1000], help="images of the first series")
    add("--few_images", type=whole(1), default=128, help="images of the other series")
    add("--image_size", type=whole(32), default=128, help="short side in pixels")
    add("--image_sizes", type=whole(32), nargs="+", default=[64, 96, 128, 192, 256], help="of the second series")
    add("--layers", type=whole(2), nargs="+", default=[2, 4, 8, 12], help="of encoder and decoder each")
    add("--processes", type=whole(1), nargs="+", default=[1, 2, 4], help="processes of the last series")
    add("--batch_size", type=whole(1), default=16, help="images per batch in each process")
    add("--rounds", type=whole(1), default=1, help="runs of each search; the one of the least CPU time counts: other "
        "work on the machine slows a core down")  # fmt: skip
    return parser


def main() -> None:
    """Run the searches that are missing, draw the plot and print the table."""
    args, _ = parse(get_parser())
    for name in ("coco_path", "checkpoint", "work", "output"):  # the scripts run in another folder
        setattr(args, name, getattr(args, name).resolve())
    growth = Growth(args)
    for point in points(args):
        growth.measure(point)
    draw(growth.figures, args.output / f"{NAME}.png")
    print(table(TITLES, [
        (p["series"], f"{p['value']:,}", p["images"], f"{p['cpu_seconds']:.1f}", f"{p['busiest_cpu_seconds']:.1f}",
         f"{p['peak_bytes'] / 1e9:.2f}", p["trials"])
        for p in growth.figures["points"]
    ]))  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
