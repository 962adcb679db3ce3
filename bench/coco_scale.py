"""Measure a fast search and the first steps of a training on a data set of COCO's size, phase by phase.

    python -m bench.coco_scale --work output/coco_scale
    python -m bench.coco_scale --work output/coco_scale --images 16 --steps 3

Makes the set and, without --checkpoint, a DN-DETR-R50 of random weights. Then runs `prune_greedy_ad.py --search fast`
on the first --images images for each scope, and `main.py` for one epoch of --steps steps. Where --images or the steps
are fewer than those of 5,000 images, the seconds for 5,000 are extrapolated, each phase by what it is counted in; the
table and the JSON say how. Figures are written as they come; a second call with the same --work and program repeats
only runs that did not end.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.coco_set import SPLIT, write_annotations, write_set
from bench.scale_rows import FULL_IMAGES, search_rows, total_row, training_rows
from bench.watched_run import WatchedRun, watch
from datasets.coco import image_folder
from models import build
from models.config import DetectorConfig
from models.prunable import SCOPES
from pruning.config import CALIBRATION_IMAGES, DETECTOR_CALIBRATION_IMAGES
from pruning.journal import JOURNAL_NAME
from runs.search_plan import OF_DETECTOR
from util.cli import parse, real, script_parser, user_path, whole
from util.environment import environment, program_commit
from util.errors import UserError, run_cli
from util.files import file_digest, save_torch, write_json
from util.logging import table

CALIBRATION = {"transformer": CALIBRATION_IMAGES, "detector": DETECTOR_CALIBRATION_IMAGES}
TRAINING = "training"
RESULT_NAME = "coco_scale.json"
FEATURES = re.compile(r"features take (\d+) MB")
TITLES = ("", "measured on", "seconds", f"for {FULL_IMAGES:,} images", "")


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the journal of a search in `folder`; none if there is none yet."""
    try:
        text = (folder / JOURNAL_NAME).read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def search_stage(folder: Path) -> str:
    """Return the stage of the search in `folder`, by its journal."""
    events = [line["event"] for line in events_of(folder)]
    if "start" not in events:
        return "start, features, gradients, mAP"
    if "end" in events:
        return "writing"
    trials = events.count("trial")
    return f"after cut {trials}" if trials else "damages, cut 1"


def training_stage(folder: Path, asked: int) -> str:
    """Return the stage of the training of `asked` steps in `folder`, by its logs."""
    if (folder / "log.txt").exists():
        return "writing"
    try:
        steps = (folder / "run.log").read_text(encoding="utf-8").count(" epoch 0 [")
    except OSError:
        steps = 0
    return "evaluation" if steps == asked else f"step {steps + 1}" if steps else "start, step 1"


class Benchmark:
    """The runs and their figures.

    Attributes:
        figures: what is written to the results.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Make data and weights, and read the figures of an earlier call with the same settings."""
        self.args = args
        args.work.mkdir(parents=True, exist_ok=True)
        self.data = args.data or args.work / "data"
        write_set(self.data, max(args.images, args.steps * args.batch_size))
        self.trained, self.evaluated = args.work / "trained.json", args.work / "evaluated.json"
        write_annotations(self.trained, args.steps * args.batch_size)
        write_annotations(self.evaluated, args.images)
        self.checkpoint = args.checkpoint or args.work / "r50.pth"
        if args.checkpoint is None and not self.checkpoint.exists():
            write_r50(self.checkpoint)
        if not self.checkpoint.is_file():
            raise UserError(f"--checkpoint {args.checkpoint}: found no such file, expected a detector")
        settings = {
            "images": args.images, "steps": args.steps, "batch_size": args.batch_size, "image_size": args.image_size,
            "keep": args.keep, "device": args.device, "num_workers": args.num_workers, "full_images": FULL_IMAGES,
            "weights": "random" if args.checkpoint is None else file_digest(args.checkpoint),
            "commit": program_commit(),
        }  # fmt: skip
        self.path = args.output / RESULT_NAME
        self.figures: dict[str, Any] = {"settings": settings, "environment": environment(args.device), "runs": {}}
        made = self.figures["environment"]
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if before.get("settings") == settings and before["environment"] | {"date": made["date"]} == made:
            self.figures["runs"] = before["runs"]

    def search(self, scope: str) -> None:
        """Run the search over one scope unless its figures are there."""
        args, name = self.args, f"search, --scope {scope}"
        folder = self._folder(name)
        words = [
            "prune_greedy_ad.py", *self._words(folder), "--search", "fast", "--scope", scope, "--search_split", SPLIT,
            "--search_images", str(args.images), "--keep", *(f"{keep:g}" for keep in args.keep),
        ]  # fmt: skip
        run = self._run(name, words, functools.partial(search_stage, folder))
        if run is None:
            return
        *lines, end = events_of(folder)
        rows = search_rows(
            run.seconds, end["phases"], trials=sum(line["event"] == "trial" for line in lines), images=args.images,
            calibration_images=CALIBRATION[scope], labels=OF_DETECTOR if scope == "detector" else {},
        )  # fmt: skip
        found = FEATURES.search((folder / "run.log").read_text(encoding="utf-8"))
        self._keep(name, run, rows, None if found is None else int(found[1]))

    def training(self) -> None:
        """Run the training steps unless their figures are there."""
        args, name = self.args, TRAINING
        folder = self._folder(name)
        words = [
            "main.py", *self._words(folder), "--epochs", "1", "--print_freq", "1", "--start_fresh",
            "--train_json", str(self.trained),
        ]  # fmt: skip
        run = self._run(name, words, functools.partial(training_stage, folder, args.steps))
        if run is not None:
            self._keep(name, run, training_rows(run, args.steps, args.batch_size, args.images))

    def _words(self, folder: Path) -> list[str]:
        args = self.args
        return [
            "--coco_path", str(self.data), "--resume", str(self.checkpoint), "--output_dir", str(folder),
            "--batch_size", str(args.batch_size), "--num_workers", str(args.num_workers), "--image_size",
            str(args.image_size), "--device", args.device, "--val_json", str(self.evaluated), "--val_images",
            str(image_folder(self.data, SPLIT)),
        ]  # fmt: skip

    def _folder(self, name: str) -> Path:
        return self.args.work / name.replace(", --", "_").replace(" ", "_")

    def _run(self, name: str, words: list[str], stage: Any) -> WatchedRun | None:
        """Run a script in an empty folder; None if its figures are there.

        Raises:
            UserError: it failed.
        """
        found = self.figures["runs"].get(name)
        if found is not None and found["code"] == 0:
            return None
        folder = self._folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        print(f"{name}: {' '.join(words)}", flush=True)
        run = watch(words, self.args.work / f"{folder.name}.log", stage, functools.partial(self._keep, name))
        if run.code != 0:
            self._keep(name, run)
            raise UserError(f"{name} ended with exit code {run.code}, see {self.args.work / folder.name}.log")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return run

    def _keep(
        self, name: str, run: WatchedRun, rows: Sequence[Mapping[str, Any]] = (), features_megabytes: int | None = None
    ) -> None:
        """Write the figures so far of a run; `rows` are those of its table, once it has ended."""
        cached = {} if features_megabytes is None else {"features_megabytes": features_megabytes}
        command = [word.replace(str(self.args.work), "WORK") for word in run.command]
        self.figures["runs"][name] = {**run.to_dict(), "command": command, **cached, "rows": list(rows)}
        write_json(self.path, self.figures)


def write_r50(path: Path) -> None:
    """Write a DN-DETR-R50 of COCO's 91 classes with random weights."""
    torch.manual_seed(0)
    model = build(DetectorConfig.from_values({"pretrained_backbone": False, "num_classes": 91}))[0]
    save_torch(path, {"model": model.state_dict()})


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.coco_scale")
    add = parser.add_argument
    add("--work", type=user_path, required=True, help="folder for the data, the runs and their logs")
    add("--data", type=user_path, help="folder of the set, if not below --work")
    add("--checkpoint", type=user_path, help="detector to prune and to train; by default a DN-DETR-R50 of random "
        "weights")  # fmt: skip
    add("--output", type=user_path, default=Path("bench/results"), help="folder for the figures")
    add("--images", type=whole(2, at_most=FULL_IMAGES), default=FULL_IMAGES, help="images of the searches and of the "
        "evaluation")  # fmt: skip
    add("--steps", type=whole(2), default=20, help="training steps")
    add("--runs", nargs="+", choices=(*SCOPES, TRAINING), default=[*SCOPES, TRAINING], help="scopes of searches, and "
        "training")  # fmt: skip
    add("--keep", type=real(0.01, at_most=1), nargs="+", default=[0.5], help="budgets of the searches")
    add("--batch_size", type=whole(1), default=2, help="images per batch")
    add("--image_size", type=whole(32), default=800, help="short side in pixels; 800 makes 800 x 1066")
    add("--num_workers", type=whole(0), default=2, help="processes that read images")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser


def main() -> None:
    """Run what is asked for and print the table."""
    args, _ = parse(get_parser())
    for name in ("work", "data", "checkpoint", "output"):  # the scripts run in another folder
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())
    if args.steps * args.batch_size > FULL_IMAGES:
        raise UserError(f"--steps {args.steps}: of {args.batch_size} images each, expected at most {FULL_IMAGES:,}")
    benchmark = Benchmark(args)
    for name in args.runs:
        if name == TRAINING:
            benchmark.training()
        else:
            benchmark.search(name)
    for name, found in benchmark.figures["runs"].items():
        rows = [*found["rows"], total_row(found["rows"])]
        print(f"\n{name}: {found['peak_bytes'] / 1e9:.2f} GB")
        print(table(TITLES, [
            (r["phase"], r["measured_on"], f"{r['seconds']:.1f}", f"{r['full_seconds']:,.0f}", r["how"]) for r in rows
        ]))  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
