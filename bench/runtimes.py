"""Time dense and slim detectors in the runtimes that a user of a CPU can choose from, on one thread.

    python -m bench.runtimes [--subjects demo r50] [--runtimes PyTorch compiled onnxruntime OpenVINO] [--rounds 5]

The subjects are the demo's detector and the paper's (ResNet-50, 300 queries, 91 classes, 800 x 1066 pixels), dense and
with all modules, those of the backbone too, cut alike to 75, 50 and 35 % of the multiply-accumulates; weights are
random, and images come one at a time. PyTorch's detectors have folded batch norms, as exports have. Every runtime must
give PyTorch's outputs before it is timed. All runtimes and detectors of a subject take turns. Writes runtimes.json to
--output; a subject that is not measured keeps its figures of the same machine and versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.latency import COCO_IMAGE_HW, KEPT_SHARES, ROOT, whole_detector_widths
from bench.published import COCO_CLASSES
from models import build
from models.config import DetectorConfig
from models.detector import Detector
from models.folding import folded_copy
from tools.export_check import TOLERANCE
from tools.export_formats import GraphForm
from tools.export_timing import EAGER, ONNXRUNTIME, OPENVINO, Calls, has_openvino, one_thread, runtime_calls, time_calls
from tools.prediction import PredictionOptions
from util.cli import script_parser, user_path, whole
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import bar_off, table
from weights.build import options_for
from weights.checkpoint_file import read_checkpoint

SUBJECTS = ("demo", "r50")
COMPILED = "compiled"
RUNTIMES = (EAGER, COMPILED, ONNXRUNTIME, OPENVINO)
CPU = torch.device("cpu")


def subject_of(name: str, checkpoint: Path) -> tuple[DetectorConfig, tuple[int, int]]:
    """Return the dense detector of a subject and its image size (height, width) in pixels."""
    if name == "r50":
        return DetectorConfig(num_classes=COCO_CLASSES), COCO_IMAGE_HW
    options = options_for(PredictionOptions(), read_checkpoint(checkpoint))
    return options.detector, (options.loader.image_size,) * 2


def detectors_of(config: DetectorConfig, image_hw: tuple[int, int], shares: Sequence[float]) -> dict[str, Detector]:
    """Build the dense detector and those with shares of its multiply-accumulates, with random weights."""
    widths = {"dense": None, **{f"{keep:.0%}": whole_detector_widths(keep, image_hw, config) for keep in shares}}
    torch.manual_seed(0)
    return {name: build(dataclasses.replace(config, cfgs=cfgs))[0].eval() for name, cfgs in widths.items()}


@torch.no_grad()
def calls_of(detectors: dict[str, Detector], image_hw: tuple[int, int], runtimes: Sequence[str]) -> Calls:
    """Return a function for each runtime and detector that runs it on one random image."""
    image = torch.randn(1, 3, *image_hw, generator=torch.Generator().manual_seed(0))
    form = GraphForm(with_mask=False, batch_size=1)
    calls = dict(runtime_calls(detectors, image, form, TOLERANCE))
    if COMPILED in runtimes:
        for name, detector in detectors.items():
            compiled = torch.compile(folded_copy(detector), dynamic=False)
            calls[COMPILED, name] = functools.partial(torch.no_grad()(compiled), image)
    return {(runtime, name): call for (runtime, name), call in calls.items() if runtime in runtimes}


def result_table(subjects: dict[str, Any]) -> str:
    """Format the figures as a table with a line for each runtime and detector."""
    rows = [
        (name, row["runtime"], row["detector"], f"{row['milliseconds']:.1f}", f"{row['speed_up']:.2f} x")
        for name, found in subjects.items()
        for row in found["rows"]
    ]
    return table(("subject", "runtime", "detector", "ms", "times as fast as dense"), rows)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.runtimes")
    add = parser.add_argument
    add("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="detectors to measure")
    add("--runtimes", nargs="+", choices=RUNTIMES, default=[EAGER, ONNXRUNTIME, OPENVINO], help="compiled: by "
        "torch.compile, which takes minutes for each detector")  # fmt: skip
    add("--rounds", type=whole(1), default=5, help="turns of each detector, after a warm-up turn")
    add("--checkpoint", type=user_path, default=ROOT / "checkpoints" / "demo.pth", help="the demo's detector")
    add("--output", type=user_path, default=Path("bench/results"), help="folder for the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    torch.set_flush_denormal(True)
    args = get_parser().parse_args(argv)
    if OPENVINO in args.runtimes and not has_openvino():
        raise UserError("--runtimes: found no package openvino, expected it (pip install '.[openvino]')")
    if COMPILED in args.runtimes and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--runtimes: found no C++ compiler for torch.compile, expected g++, or the name of one in CXX")
    path = args.output / "runtimes.json"
    with one_thread():
        versions = {name: version(name) for name in ("onnxruntime", "openvino") if find_spec(name)}
        told = {**environment(CPU), **versions}
        subjects = _subjects_before(path, told)
        for name in args.subjects:
            config, image_hw = subject_of(name, args.checkpoint)
            calls = calls_of(detectors_of(config, image_hw, KEPT_SHARES), image_hw, args.runtimes)
            with tqdm(total=1 + args.rounds, unit="turn", desc=name, disable=bar_off(), leave=False) as bar:
                rows = time_calls(calls, args.rounds, "dense", lambda bar=bar: bar.update())
            subjects[name] = {"image_size_hw": list(image_hw), "rounds": args.rounds, "rows": rows}
            args.output.mkdir(parents=True, exist_ok=True)
            write_json(path, {"environment": told, "subjects": subjects})
    print(result_table(subjects))
    print(path)


def _subjects_before(path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an earlier run with the same versions on the same machine."""
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return before["subjects"] if before["environment"] | {"date": told["date"]} == told else {}


if __name__ == "__main__":
    run_cli(main)
