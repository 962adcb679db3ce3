"""Compare recipes of fine-tuning: dense and pruned detectors given the same data, steps and options.

    python -m bench.finetune demo --checkpoint checkpoints/demo.pth --draw 10000 --work output/finetune --jobs 12

Searches the pruned detectors, then trains every configuration as a process of its own, `--jobs` at the same time.
finetune_NAME.json in --output is written whenever a process ends; a second call does what is missing. AP is that of
val2017 in float32, after training that of the averaged weights.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.demo import draw_set
from util.cli import parse, script_parser, user_path, whole
from util.environment import environment, program_commit
from util.errors import UserError, run_cli
from util.files import file_digest, write_json
from util.logging import table
from util.threads import usable_cores

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE, SEED, VAL_IMAGES = 128, 42, 400  # of the drawn set: that of checkpoints/train_demo.sh
WHOLE = ("--scope", "detector", "--keep", "0.5")
SLIM = {"slim47": ("--keep", "0.53"), "slim70": ("--keep", "0.30"), "whole50": WHOLE}
# The losses that checkpoints/demo.pth was trained with, and its augmentation.
COMMON = "--batch_size 16 --cls_loss_coef 2 --label_noise_scale 1 --augmentation flip --num_workers 0 --cache_images"
RECIPE = {
    "lr": "1e-4",
    "lr_backbone": "1e-5",
    "lr_schedule": "cosine",
    "weight_decay_on": "matrices",
    "warmup_iters": "50",
    "ema_decay": "0.998",
}
RATES = ("4e-4", "1e-4", "2e-4", "8e-4", "3e-5", "1e-5")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Configuration:
    """One training: the detector it starts from (`dense` or one of `SLIM`), options that replace `RECIPE`'s, a seed."""

    name: str
    subject: str
    options: Mapping[str, str]
    seed: int = 42


def configurations() -> list[Configuration]:
    """Return all configurations, the most telling first, in case time runs out."""
    found: list[Configuration] = []

    def add(name: str, subject: str, seed: int = 42, **options: str) -> None:
        found.append(Configuration(f"{subject}: {name}", subject, options, seed))

    for subject in ("slim47", "dense"):
        for rate in RATES:
            add(f"lr {rate}", subject, lr=rate, lr_backbone=f"{float(rate) / 10:.0e}")
    add("distilled, matching", "slim47", distill_queries="matching")
    add("distilled, denoising", "slim47", distill_queries="denoising")
    add("distilled, matching denoising", "slim47", distill_queries="matching denoising")
    add("distilled, anchors", "slim47", distill_queries="anchors")
    add("distilled, matching anchors", "slim47", distill_queries="matching anchors")
    add("distilled, targets", "slim47", distill_queries="targets")
    add("distilled, all", "slim47", distill_queries="matching denoising anchors targets")
    add("distilled, matching, no memory", "slim47", distill_queries="matching", distill_memory_coef="0")
    add("distilled, matching denoising", "dense", distill_queries="matching denoising")
    for rate in ("2e-4", "4e-4"):
        add(f"lr {rate}, distilled, matching denoising", "slim47", lr=rate, lr_backbone=f"{float(rate) / 10:.0e}",
            distill_queries="matching denoising")  # fmt: skip
    add("backbone at the full rate", "slim47", lr_backbone="1e-4")
    for subject in ("slim47", "dense", "whole50", "slim70"):
        add("rates of the dense training", subject, lr="4e-4", lr_backbone="6e-4")  # of checkpoints/demo.pth
    for subject in ("slim47", "dense"):
        add("twice the rates of the dense training", subject, lr="8e-4", lr_backbone="1.2e-3")
        add("half the rates of the dense training", subject, lr="2e-4", lr_backbone="3e-4")
    add("backbone frozen", "slim47", lr_backbone="0")
    add("no averaging", "slim47", ema_decay="0")
    add("averaging 0.99", "slim47", ema_decay="0.99")
    add("averaging 0.9995", "slim47", ema_decay="0.9995")
    add("decay on all", "slim47", weight_decay_on="all")
    add("no warm-up", "slim47", warmup_iters="0")
    add("steps, no averaging, decay on all", "slim47", lr_schedule="step", ema_decay="0", weight_decay_on="all",
        warmup_iters="0")  # fmt: skip
    for subject in ("slim70", "whole50"):
        add("lr 1e-4", subject)
        add("lr 4e-4", subject, lr="4e-4", lr_backbone="4e-5")
        add("distilled, matching denoising", subject, distill_queries="matching denoising")
        add("distilled, matching denoising, backbone at the full rate", subject, lr_backbone="1e-4",
            distill_queries="matching denoising")  # fmt: skip
    for seed in (43, 44):
        for subject in ("slim47", "dense"):
            add(f"rates of the dense training, seed {seed}", subject, seed, lr="4e-4", lr_backbone="6e-4")
            add(f"lr 4e-4, seed {seed}", subject, seed, lr="4e-4", lr_backbone="4e-5")
            add(f"lr 1e-4, seed {seed}", subject, seed)
            add(f"distilled, matching denoising, seed {seed}", subject, seed, distill_queries="matching denoising")
    return found


class Stopped(Exception):
    """The time limit ended a process."""


class Bench:
    """Runs searches and trainings as processes, and keeps their results in one file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = args.output / f"finetune_{args.name}.json"
        self.deadline = time.monotonic() + args.limit_seconds
        self._lock = threading.Lock()
        self.settings = {
            "name": args.name, "epochs": args.epochs, "checkpoint": file_digest(args.checkpoint),
            "images": args.draw if args.coco_path is None else None, "options": f"{COMMON} {args.options}".strip(),
        }  # fmt: skip
        self.result: dict[str, Any] = {**self.settings, "cut": {}, "rows": []}
        if self.path.is_file():
            older = json.loads(self.path.read_text())
            if any(older.get(key) != value for key, value in self.settings.items()):
                raise UserError(f"{self.path}: made with other settings, expected {self.settings} or another --output")
            self.result = older
        self.result["environment"] = {**environment(), "threads": 1}  # of each process, see `run_script`

    def run_script(self, words: Sequence[str], log: Path) -> None:
        """Run a script of the project until it ends, or until the time limit.

        Raises:
            Stopped: the time limit came first.
            UserError: it failed.
        """
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if time.monotonic() >= self.deadline:
            raise Stopped
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env={**os.environ, **threads}, stdout=file, stderr=file
            )
            while process.poll() is None:
                if time.monotonic() >= self.deadline:
                    process.kill()
                    process.wait()
                    raise Stopped
                time.sleep(POLL_SECONDS)
        if process.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{log}: {words[0]} ended with exit code {process.returncode}: {last}")

    def _main(self, name: str, script: str, start: Path, *options: str) -> Path:
        folder = self.args.work / name.replace(":", "").replace(",", "").replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        words = [script, "--coco_path", str(self.args.coco_path), "--resume", str(start), "--output_dir", str(folder)]
        device = ["--device", self.args.device] if self.args.device else []
        self.run_script([*words, *device, *options], folder / "output.log")
        return folder

    def prepare(self, subject: str) -> Path:
        """Search a detector, unless it is there; evaluate it as cut; return its checkpoint."""
        given = dict(pair.split("=", 1) for pair in self.args.given)
        start = self.args.checkpoint if subject == "dense" else Path(given.get(subject, ""))
        if subject != "dense" and subject not in given:
            start = self.args.work / subject / "pruned.pth"
            if not start.is_file():
                images = str(self.args.search_images)
                self._main(subject, "prune_greedy_ad.py", self.args.checkpoint, *SLIM[subject], "--batch_size", "16",
                           "--search_split", "train2017", "--search_images", images, "--num_workers", "0")  # fmt: skip
        if subject not in self.result["cut"]:
            folder = self._main(f"{subject}_as_cut", "main.py", start, "--eval", "--batch_size", "16",
                                "--num_workers", "0")  # fmt: skip
            found = json.loads((folder / "eval.json").read_text())
            self._keep(cut=(subject, {key: found[key] for key in KEPT}))
        return start

    def train(self, configuration: Configuration, start: Future[Path]) -> None:
        """Train one configuration and keep its curve; that of an unfinished one, too."""
        began = time.perf_counter()
        options = {**RECIPE, **configuration.options}
        distilled = "distill_queries" in options
        words = [word for key, value in options.items() for word in (f"--{key}", *value.split())]
        words += ["--distill", str(self.args.checkpoint) if distilled else "none"]
        words += ["--start_fresh"] if configuration.subject == "dense" else []  # its own training may have ended
        words += ["--epochs", str(self.args.epochs), "--seed", str(configuration.seed), "--print_freq", "0"]
        words += ["--amp", "bf16" if self.args.amp else "off", *COMMON.split(), *self.args.options.split()]
        folder = self.args.work / configuration.name.replace(":", "").replace(",", "").replace(" ", "_")
        finished = True
        try:
            self._main(configuration.name, "main.py", start.result(), *words)
        except Stopped:
            finished = False
        log = folder / "log.txt"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        curve = [{key: line[key] for key in CURVE if key in line} for line in lines]
        row = {
            "name": configuration.name, "subject": configuration.subject, "options": options,
            "seed": configuration.seed, "finished": finished, "ap": curve[-1]["test_AP"] if curve else None,
            "seconds": round(time.perf_counter() - began, 1), "curve": curve, "commit": program_commit(),
        }  # fmt: skip
        self._keep(row=row)

    def _keep(self, cut: tuple[str, Any] | None = None, row: dict[str, Any] | None = None) -> None:
        with self._lock:
            if cut is not None:
                self.result["cut"][cut[0]] = cut[1]
            if row is not None:
                self.result["rows"] = [r for r in self.result["rows"] if r["name"] != row["name"]] + [row]
                print(f"{row['name']}: AP {_points(row['ap'])}, {row['seconds']:.0f} s", flush=True)
            write_json(self.path, self.result)

    def run(self, chosen: Sequence[Configuration]) -> list[str]:
        """Run the configurations that are missing; return the errors of those that failed."""
        done = {row["name"] for row in self.result["rows"] if row["finished"]}
        todo = [one for one in chosen if one.name not in done]
        subjects = list(dict.fromkeys(one.subject for one in todo))
        errors = []
        with ThreadPoolExecutor(max(1, len(subjects))) as searches, ThreadPoolExecutor(self.args.jobs) as jobs:
            starts = {subject: searches.submit(self.prepare, subject) for subject in subjects}
            trainings = [jobs.submit(self.train, one, starts[one.subject]) for one in todo]
            for training in trainings:
                try:
                    training.result()
                except Stopped:
                    pass
                except UserError as error:
                    errors.append(str(error))
        return errors


KEPT = ("AP", "AP50", "params", "transformer_params", "gmacs", "detector_gmacs")
CURVE = ("epoch", "lr", "train_loss", "test_AP", "test_AP50", "train_seconds", "test_seconds")


def _points(ap: float | None) -> str:
    return "" if ap is None else f"{100 * ap:.2f}"


def result_table(result: Mapping[str, Any]) -> str:
    """Return AP in points by configuration: as cut, after each epoch."""
    rows = [(name, _points(cut["AP"]), "", "") for name, cut in result["cut"].items()]
    for row in result["rows"]:
        curve = " ".join(_points(line.get("test_AP")) for line in row["curve"])
        rows.append((row["name"], _points(row["ap"]) if row["finished"] else "unfinished", curve, row["seconds"]))
    return table(["", "AP", "by epoch", "seconds"], rows)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.finetune")
    add = parser.add_argument
    add("name", help="name of the data set in the results")
    add("--coco_path", type=user_path, help="data set in COCO layout; by default the demo set, drawn to --work")
    add("--draw", type=whole(1), default=10000, help="training images of the demo set to draw")
    add("--checkpoint", type=user_path, required=True, help="dense detector, also the teacher")
    add("--given", nargs="+", default=[], metavar="SUBJECT=FILE", help="outputs of searches, in place of own searches")
    add("--work", type=user_path, required=True, help="folder for data, searches and trainings")
    add("--output", type=user_path, default=Path("bench/results"), help="folder for the results")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="configurations by name, such as 'slim47: lr*'")
    add("--epochs", type=whole(1), default=2, help="epochs of each training")
    add("--options", default="", help="more options for each training, in one argument")
    add("--search_images", type=whole(1), default=400, help="first training images to search on")
    add("--jobs", type=whole(1), default=1, help="trainings at the same time")
    add("--limit_seconds", type=whole(1), default=10**6, help="end after so many seconds with what is done")
    add("--device", help="of all scripts, by default cuda if available")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="train in bf16")
    add("--list", action="store_true", help="print the configurations and stop")
    return parser


def main() -> None:
    """Run the missing configurations; print the table."""
    args, _ = parse(get_parser())
    chosen = [c for c in configurations() if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in args.only)]
    if not chosen:
        raise UserError(f"--only: found no configuration named {', '.join(args.only)}, expected names of --list")
    if args.list:
        print("\n".join(configuration.name for configuration in chosen))
        return
    args.work, args.checkpoint = args.work.resolve(), args.checkpoint.resolve()
    bench = Bench(args)
    if args.coco_path is None:
        args.coco_path = args.work / "data"
        draw_set(args.coco_path, images=args.draw, val_images=min(VAL_IMAGES, args.draw), seed=SEED, size=IMAGE_SIZE,
                 jobs=usable_cores())  # fmt: skip
        print(f"drawn after {args.limit_seconds - (bench.deadline - time.monotonic()):.0f} s", flush=True)
    errors = bench.run(chosen)
    print(result_table(bench.result))
    if errors:
        raise UserError("; ".join(errors))


if __name__ == "__main__":
    run_cli(main)
