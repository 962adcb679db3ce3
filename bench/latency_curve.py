"""Compare searches by multiply-accumulates and by measured latency: AP as cut against milliseconds.

    python -m bench.latency_curve demo --coco_path COCODIR --checkpoint checkpoints/demo.pth --work output/curve

Runs `prune_greedy_ad.py --search fast` over the transformer by MACs, over the whole detector by MACs and by latency,
and by latency with `--min_units 0`, each with several budgets. All searches by latency share one table. Then evaluates
every detector as cut on val2017 and times all of them in turns. Writes latency_curve_NAME.json and its plot to
--output; a second call with the same --work repeats only the searches that did not end.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.subject import CPU, Subject, get_subject_parser
from models.detector import Detector
from models.folding import folded_copy
from pruning.cost import cost_of
from pruning.journal import OUTPUT_NAME
from pruning.latency import measure_whole
from pruning.latency_table import TABLE_NAME, Setting
from reports.plots import new_figure, save_figure
from runs.search_results import SUMMARY_NAME
from tools.prediction import load_detector
from util.cli import real, user_path, whole
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import file_digest, write_json
from util.logging import bar_off, table

ROOT = Path(__file__).resolve().parent.parent
SEARCH_IMAGES = 400
DENSE = "dense"
TRANSFORMER, MACS, LATENCY = "transformer, by MACs", "whole detector, by MACs", "whole detector, by latency"
REMOVING = "whole detector, by latency, width 0 allowed"
BY_LATENCY = ("--scope", "detector", "--cost", "latency")
# The first search by latency measures the table, which has every width of the others.
SEARCHES = {
    REMOVING: (*BY_LATENCY, "--min_units", "0"),
    LATENCY: BY_LATENCY,
    MACS: ("--scope", "detector", "--cost", "macs"),
    TRANSFORMER: ("--scope", "transformer", "--cost", "macs"),
}


def run_search(args: argparse.Namespace, name: str, keeps: Sequence[float]) -> list[Path]:
    """Run a search with several budgets unless it has ended; return its output files, the largest budget first.

    Raises:
        UserError: the search failed.
    """
    folder = args.work / name.replace(",", "").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "prune_greedy_ad.py", "--coco_path", args.coco_path, "--resume", args.checkpoint, "--output_dir", str(folder),
        "--search_split", "train2017", "--search_images", str(args.search_images),
        "--calibration_images", str(args.search_images), "--batch_size", str(args.batch_size), "--num_workers", "0",
        "--device", "cpu", *SEARCHES[name], "--keep", *(f"{keep:g}" for keep in keeps),
    ]  # fmt: skip
    given = args.work / REMOVING.replace(",", "").replace(" ", "_") / TABLE_NAME
    if name == LATENCY and REMOVING in args.searches:
        words += ["--latency_table", str(given)]
    done = folder / "command.json"
    if not done.is_file() or json.loads(done.read_text()) != words:
        threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        with (folder / "output.log").open("w") as log:
            code = subprocess.call(
                [sys.executable, *words], cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=log
            )
        if code:
            raise UserError(f"{folder / 'output.log'}: the search {name} ended with exit code {code}")
        write_json(done, words)
    points = json.loads((folder / SUMMARY_NAME).read_text())["points"] if len(keeps) > 1 else []
    return [folder / point["file"] for point in points if point["file"]] or [folder / OUTPUT_NAME]


def predicted_times(path: Path) -> float | None:
    """Return how many times as fast the search that wrote a file predicted it to be; None if by MACs."""
    summary = path.parent / SUMMARY_NAME  # none of a search by MACs with one budget
    latency = json.loads(summary.read_text()).get("latency") if summary.is_file() else None
    if latency is None:
        return None
    found = [name for name in latency["detectors"] if name != "before"]
    name = path.stem.removeprefix(f"{Path(OUTPUT_NAME).stem}_") if len(found) > 1 else found[0]
    return latency["detectors"]["before"]["predicted"] / latency["detectors"][name]["predicted"]


def measure(subject: Subject, paths: Mapping[str, Sequence[Path]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for the dense detector and for each file: AP on val2017, milliseconds an image, GMACs, widths.

    Rows of searches by latency also have how many times as fast as the dense detector the search predicted them.

    All detectors are timed in turns, `args.batch_size` images at once.
    """
    detectors: dict[str, tuple[str, Path, Detector]] = {}
    files = [(DENSE, args.checkpoint), *((name, path) for name, of_search in paths.items() for path in of_search)]
    for name, path in files:
        loaded = load_detector(path, CPU)
        detectors[f"{name} {len(detectors)}"] = name, Path(path), loaded.model
    setting = Setting.of(CPU, subject.image_size_hw, args.batch_size, "off")
    rows = []
    for key, (name, path, model) in tqdm(detectors.items(), desc="AP", disable=bar_off()):
        stats = subject.evaluate(model)
        cost = cost_of(model, subject.image_size_hw)
        rows.append({
            "key": key, "name": name, "file": path.name, "ap": stats["AP"], "ap50": stats["AP50"],
            "detector_gmacs": cost.detector_gmacs, "params": cost.params,
            "widths": model.widths_in("detector").to_list(),
            "predicted_times": None if name == DENSE else predicted_times(path),
        })  # fmt: skip
    built = {key: functools.partial(folded_copy, model) for key, (_, _, model) in detectors.items()}
    times = measure_whole(built, setting, CPU, graphs=False)
    for row in rows:
        found = times[row.pop("key")]
        row |= {"milliseconds": found.milliseconds / args.batch_size, "spread": found.spread / args.batch_size}
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print all rows."""
    dense = rows[0]
    cells = [
        (
            row["name"], f"{100 * row['ap']:.1f}", f"{row['milliseconds']:.2f}",
            f"{dense['milliseconds'] / row['milliseconds']:.2f}",
            f"{dense['detector_gmacs'] / row['detector_gmacs']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    print(table(("", "AP", "ms an image", "times as fast", "times fewer MACs"), cells))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw AP against milliseconds an image, one line for each search, to a PNG file."""
    figure = new_figure(8, 6)
    axes = figure.add_subplot()
    for name in SEARCHES:
        of_search = [row for row in rows if row["name"] in (DENSE, name)]
        if len(of_search) > 1:
            of_search = sorted(of_search, key=lambda row: row["milliseconds"])
            axes.plot(
                [row["milliseconds"] for row in of_search], [100 * row["ap"] for row in of_search],
                marker="o", label=name,
            )  # fmt: skip
    axes.set(xlabel="ms an image", ylabel="AP as cut")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = get_subject_parser("bench.latency_curve", __doc__, search_images=SEARCH_IMAGES)
    add = parser.add_argument
    fraction = real(0.01, at_most=1.0)
    add("--work", type=user_path, required=True, help="folder for the searches")
    add("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="searches to compare")
    add("--keep", type=fraction, nargs="+", default=[0.8, 0.65, 0.5, 0.35], help="of the detector's MACs")
    add("--keep_transformer", type=fraction, nargs="+", default=[0.8, 0.6, 0.4], help="of the transformer's MACs")
    add("--keep_time", type=fraction, nargs="+", default=[0.9, 0.8, 0.7, 0.6], help="of the detector's milliseconds")
    add("--keep_time_removing", type=fraction, nargs="+", default=[0.7, 0.6, 0.5, 0.3],
        help="of the detector's milliseconds, with --min_units 0")  # fmt: skip
    add("--batch_size", type=whole(1), default=1, help="images at once when timed")
    add("--threads", type=whole(1), default=1, help="threads of the searches and of the timing")
    return parser


def main() -> None:
    """Run the searches, measure their detectors and print the table."""
    torch.set_flush_denormal(True)
    args = get_parser().parse_args()
    torch.set_num_threads(args.threads)
    args.work, args.checkpoint = args.work.resolve(), str(Path(args.checkpoint).resolve())
    args.coco_path = str(Path(args.coco_path).resolve())
    keeps = {
        REMOVING: args.keep_time_removing, LATENCY: args.keep_time, MACS: args.keep, TRANSFORMER: args.keep_transformer,
    }  # fmt: skip
    paths = {name: run_search(args, name, keeps[name]) for name in SEARCHES if name in args.searches}
    rows = measure(Subject(args.coco_path, args.checkpoint, 1, 1), paths, args)
    settings = {
        "name": args.name, "search_images": args.search_images, "checkpoint": file_digest(args.checkpoint),
        "batch_size": args.batch_size,
    }  # fmt: skip
    write_json(
        args.output / f"latency_curve_{args.name}.json", {**settings, "environment": environment(), "rows": rows}
    )
    draw(rows, args.output / f"latency_curve_{args.name}.png")
    print_table(rows)


if __name__ == "__main__":
    run_cli(main)
