"""Measure how much time the saved multiply-accumulates save: dense and slim detectors side by side.

    python -m bench.latency [--device cuda] [--subjects gp mgp demo] [--modes eager bf16] [--batches 1 8]

The subjects are the paper's GP and MGP widths (ResNet-50, 300 queries, 91 classes, 800 x 1066 pixels), that detector
with all modules, those of the backbone too, cut alike to 75, 50 and 35 % of its multiply-accumulates, and the demo's:
that of `make demo`, and the one that `bench.backbone_baselines` searched for 50 % of the multiply-accumulates.
Each is compared with its dense detector; weights are random. The layers before the transformer are timed separately,
once for all detectors with the same backbone; a detector's time is the sum. The detectors take turns so that machine
load affects all alike, and ratios are medians over the turns. Writes NAME_cpu.json or NAME_cuda.json to --output;
earlier cases of the same machine and versions stay unless measured again.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm

from bench.published import COCO_CLASSES, GP_WIDTHS, MGP_WIDTHS
from engine import autocast
from models import build
from models.config import DetectorConfig
from models.folding import fold_norms
from models.state import Features
from models.widths import Widths
from pruning.cost import cost_of
from pruning.step_timing import Step, captured
from tools.prediction import PredictionOptions
from util import distributed
from util.cli import user_path, whole
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import bar_off, table
from util.timing import seconds_side_by_side
from weights.build import options_for
from weights.checkpoint_file import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
COCO_IMAGE_HW = (800, 1066)  # a 480 x 640 image resized
SUBJECTS = ("gp", "mgp", "whole", "demo", "demo50")
KEPT_SHARES = (0.75, 0.5, 0.35)  # of the whole detector's multiply-accumulates
OWN_ROW = "ours, whole detector"  # of bench.backbone_baselines
UNIT = 16  # channels; every width of the whole detectors is a multiple
FRONT = "front"


@dataclass(frozen=True)
class Mode:
    """How to run a detector.

    Attributes:
        amp: key of `engine.AMP_DTYPES`.
        compiled: use `torch.compile`, on CUDA with CUDA graphs (`reduce-overhead`).
        replayed: replay a CUDA graph of the eager detector, so that launching its kernels takes no time.
        padded: pad head widths to those of fused kernels, see `models.attention.fused_widths`.
        folded: fold batch norms into convolutions, as `inference.py` does; see `models.folding`.
    """

    amp: str = "off"
    compiled: bool = False
    replayed: bool = False
    padded: bool = True
    folded: bool = False


MODES = {
    "eager": Mode(),
    "folded": Mode(folded=True),
    "bf16": Mode("bf16"),
    "graph": Mode(replayed=True),
    "graph-bf16": Mode("bf16", replayed=True),
    "compiled": Mode(compiled=True),
    "compiled-bf16": Mode("bf16", compiled=True),
    "eager-unpadded": Mode(padded=False),
    "bf16-unpadded": Mode("bf16", padded=False),
}


@dataclass(frozen=True)
class Group:
    """Detectors that differ only in widths.

    Attributes:
        image_size_hw: height and width of the images in pixels.
        dense: the dense detector.
        slim: the other detectors by name in the table.
    """

    image_size_hw: tuple[int, int]
    dense: nn.Module
    slim: Mapping[str, nn.Module]

    def detectors(self) -> dict[str, nn.Module]:
        """All detectors by name, the dense one first."""
        return {"dense": self.dense, **self.slim}

    def front_of(self, name: str) -> str:
        """Name of the measurement of a detector's layers before its transformer, which an unpruned backbone shares."""
        widths = self.detectors()[name].widths.backbone
        return FRONT if widths == self.dense.widths.backbone else f"{FRONT} of {name}"


def coco_group(widths: Mapping[str, Widths], device: torch.device) -> Group:
    """Build the paper's detector, dense and with the named widths."""
    return _group(DetectorConfig(num_classes=COCO_CLASSES), widths, COCO_IMAGE_HW, device)


def whole_detector_widths(
    keep: float, image_hw: tuple[int, int] = COCO_IMAGE_HW, config: DetectorConfig | None = None
) -> Widths:
    """Return the widths of a detector, the paper's by default, with all modules cut alike to `keep` of its MACs."""
    config = config or DetectorConfig(num_classes=COCO_CLASSES)
    with torch.device("meta"):
        dense = build(config)[0]
    full = {name: module.width for name, module in dense.prunable_modules("detector").items()}
    most = keep * cost_of(dense, image_hw).detector_gmacs

    def widths_at(percent: int) -> Widths:
        widths = dense.widths_in("detector")
        for name, width in full.items():
            widths = widths.replace(name, min(width, max(UNIT, round(percent * width / 100 / UNIT) * UNIT)))
        return widths

    def gmacs_at(percent: int) -> float:
        with torch.device("meta"):
            return cost_of(build(dataclasses.replace(config, cfgs=widths_at(percent)))[0], image_hw).detector_gmacs

    return widths_at(bisect.bisect_right(range(101), most, lo=1, key=gmacs_at) - 1)


def demo_group(checkpoint: Path, results: Path, device: torch.device, subjects: Sequence[str] = ("demo",)) -> Group:
    """Build the demo's detector, dense from its checkpoint and with widths from the files of the benchmarks."""
    read = read_checkpoint(checkpoint)
    options = options_for(PredictionOptions(), read)
    widths = {}
    if "demo" in subjects:
        widths["demo"] = _widths_in(results / "demo_summary.json", lambda row: True)
    if "demo50" in subjects:
        widths["demo, 50%"] = _widths_in(
            results / "backbone_baselines_demo.json", lambda row: row["name"] == OWN_ROW and row["keep"] == 0.5
        )
    return _group(options.detector, widths, (options.loader.image_size,) * 2, device)


def _widths_in(path: Path, is_chosen: Callable[[Mapping[str, Any]], bool]) -> Widths:
    """Return the widths of the last row of a benchmark's file that is chosen."""
    try:
        return Widths.parse([row for row in json.loads(path.read_text())["rows"] if is_chosen(row)][-1]["widths"])
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: found no widths ({error!r:.60}), expected what the benchmark writes") from None


def _group(config: DetectorConfig, slim: Mapping[str, Widths], image_hw: tuple[int, int], device: Any) -> Group:
    def detector(widths: Widths | None) -> nn.Module:
        torch.manual_seed(0)
        return build(dataclasses.replace(config, cfgs=widths))[0].eval().to(device)

    return Group(image_hw, detector(config.cfgs), {name: detector(widths) for name, widths in slim.items()})


def transformer_of(detector: nn.Module, mode: Mode) -> Callable[[Features], dict]:
    """Return a function that maps features to outputs in this mode."""

    def run(features: Features) -> dict:
        return detector.outputs(detector.run_steps(detector.first_state(features)))

    return _in_mode(run, mode, next(detector.parameters()).device)


def _in_mode(function: Callable[[Any], Any], mode: Mode, device: torch.device) -> Callable[[Any], Any]:
    if mode.compiled:
        # CUDA graphs avoid the launch of each kernel, which dominates the time of small ones.
        options = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
        function = torch.compile(function, dynamic=False, **options)
    if mode.replayed:
        return _replayed(function, mode.amp, device)

    def run(given: Any) -> Any:
        if mode.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, mode.amp):
            return function(given)

    return run


def _replayed(function: Callable[[Any], Any], amp: str, device: torch.device) -> Callable[[Any], Any]:
    """Return a function that captures a CUDA graph of its first call and replays it in all others."""
    first: list[tuple[Any, Step]] = []  # its argument, which the graph reads

    def run(given: Any) -> Any:
        if not first:
            first.append((given, captured([("all", lambda _: function(given))], device, amp)[0]))
        argument, (_, replay) = first[0]
        assert given is argument
        return replay(None)

    return run


def _padding(mode: Mode) -> contextlib.AbstractContextManager:
    if mode.padded:
        return contextlib.nullcontext()
    return mock.patch("models.attention.fused_widths", lambda query, value, *_: (query, value))


@torch.no_grad()
def measure(
    group: Group, mode: Mode, batch: int, repeats: int, on_turn: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Time the part before the transformer and each transformer on a batch of images; seconds of each turn."""
    device = next(group.dense.parameters()).device
    if mode.folded:
        group = _folded(group)
    images = torch.randn(batch, 3, *group.image_size_hw, generator=torch.Generator().manual_seed(0)).to(device)
    torch.compiler.reset()
    with _padding(mode):
        with autocast(device, mode.amp):
            features = group.dense.features(images)
        calls = {}
        for name, detector in group.detectors().items():
            if group.front_of(name) not in calls:
                calls[group.front_of(name)] = functools.partial(_in_mode(detector.features, mode, device), images)
            calls[name] = functools.partial(transformer_of(detector, mode), features)
        return seconds_side_by_side(calls, device, rounds=repeats, on_turn=on_turn)


def _folded(group: Group) -> Group:
    """Return a copy of a group whose detectors have no batch norms in their backbones."""
    group = copy.deepcopy(group)
    for detector in group.detectors().values():
        fold_norms(detector)
    return group


def cases_of(group: Group, mode_name: str, batch: int, seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return the figures of each detector of a group from the result of `measure`.

    `speed_up` is that of the transformer, `share` the part of the saving in multiply-accumulates that it achieves.
    """
    dense = seconds["dense"]
    whole = {
        name: [front + rest for front, rest in zip(seconds[group.front_of(name)], seconds[name], strict=True)]
        for name in group.detectors()
    }
    costs = {name: cost_of(detector, group.image_size_hw) for name, detector in group.detectors().items()}
    cases = []
    for name in group.detectors():
        speed_up = statistics.median(a / b for a, b in zip(dense, seconds[name], strict=True))
        ratio = costs["dense"].gmacs / costs[name].gmacs
        cases.append(
            {
                "mode": mode_name, "batch": batch, "threads": torch.get_num_threads(), "subject": name,
                "image_size_hw": list(group.image_size_hw),
                "repeats": len(dense), "gmacs": costs[name].gmacs, "gmacs_ratio": ratio,
                "detector_gmacs_ratio": costs["dense"].detector_gmacs / costs[name].detector_gmacs,
                "ms_transformer": 1000 * statistics.median(seconds[name]),
                "ms_detector": 1000 * statistics.median(whole[name]),
                "speed_up": speed_up, "share": speed_up / ratio,
                "speed_up_detector": statistics.median(a / b for a, b in zip(whole["dense"], whole[name], strict=True)),
            }
        )  # fmt: skip
    return cases


def run(
    groups: Sequence[Group],
    modes: Sequence[str],
    batches: Sequence[int],
    repeats: int,
    on_cases: Callable[[list[dict[str, Any]]], Any],
) -> list[dict[str, Any]]:
    """Measure all cases, mode by mode; `on_cases` is called with the cases so far after each group."""
    todo = [(group, mode, batch) for mode in modes for batch in batches for group in groups]
    cases = []
    with tqdm(total=len(todo) * (1 + repeats), unit="turn", disable=bar_off(), leave=False) as bar:
        for group, mode, batch in todo:
            bar.set_description(f"{mode}, batch {batch}, {', '.join(group.slim)}")
            cases += cases_of(group, mode, batch, measure(group, MODES[mode], batch, repeats, lambda: bar.update()))
            on_cases(cases)
    return cases


def result_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Format the figures as a table with one line for each detector."""
    titles = ("mode", "batch", "detector", "ms", "fewer MACs", "faster", "transformer ms", "fewer", "faster", "share")
    return table(titles, [
        (
            case["mode"], case["batch"], case["subject"], f"{case['ms_detector']:.1f}",
            f"{case['detector_gmacs_ratio']:.2f} x", f"{case['speed_up_detector']:.2f} x",
            f"{case['ms_transformer']:.1f}", f"{case['gmacs_ratio']:.2f} x", f"{case['speed_up']:.2f} x",
            f"{case['share']:.2f}",
        )
        for case in cases
    ])  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = argparse.ArgumentParser(
        "python -m bench.latency",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS[:-1]), help="slim detectors to measure")
    add("--modes", nargs="+", choices=tuple(MODES), default=["eager", "bf16"],
        help="float32, float32 with folded batch norms, bfloat16 by autocast, CUDA graphs (not on a CPU), "
        "torch.compile (minutes for each detector and batch), or without padded head widths")  # fmt: skip
    add("--batches", nargs="+", type=whole(1), default=[1, 8], help="batch sizes")
    add("--repeats", type=whole(1), default=5, help="turns of each detector, after a warm-up turn")
    add("--threads", type=whole(1), default=1, help="CPU threads; with one, only CPU time is counted")
    add("--checkpoint", type=user_path, default=ROOT / "checkpoints" / "demo.pth", help="the demo's detector")
    add("--output", type=user_path, default=Path("bench/results"), help="folder for the figures")
    add("--name", default="latency", help="name of the file, before the device")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    torch.set_flush_denormal(True)
    args = get_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    device = distributed.choose_device(args.device)
    if device.type != "cuda" and any(MODES[mode].replayed for mode in args.modes):
        raise UserError(f"--modes: found a CUDA graph for --device {args.device}, expected --device cuda")
    if any(MODES[mode].compiled for mode in args.modes) and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--modes: found no C++ compiler for torch.compile, expected g++, or the name of one in CXX")
    groups = []
    widths = {n: w for n, w in (("GP", GP_WIDTHS), ("MGP", MGP_WIDTHS)) if n.lower() in args.subjects}
    if "whole" in args.subjects:
        widths |= {f"{keep:.0%}": whole_detector_widths(keep) for keep in KEPT_SHARES}
    if widths:
        groups.append(coco_group(widths, device))
    if {"demo", "demo50"} & {*args.subjects}:
        groups.append(demo_group(args.checkpoint, ROOT / "bench" / "results", device, args.subjects))
    path, told = args.output / f"{args.name}_{device.type}.json", environment(device)
    args.output.mkdir(parents=True, exist_ok=True)
    before = _cases_before(path, told)

    def save(cases: Sequence[dict[str, Any]]) -> None:
        new = {_key(case) for case in cases}
        kept = [case for case in before if _key(case) not in new]
        in_order = sorted([*kept, *cases], key=lambda case: (list(MODES).index(case["mode"]), case["batch"]))
        write_json(path, {"environment": told, "cases": in_order})

    print(result_table(run(groups, args.modes, args.batches, args.repeats, save)))
    print(path)


def _cases_before(path: Path, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of an earlier run with the same versions on the same machine."""
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    of_run = {key: told[key] for key in ("date", "threads")}  # each case has its threads
    return before["cases"] if before["environment"] | of_run == told else []


def _key(case: Mapping[str, Any]) -> tuple:
    return case["mode"], case["batch"], case.get("threads", 1), case["subject"], case["image_size_hw"][0]


if __name__ == "__main__":
    run_cli(main)
