"""What a search costs: this package's own against the paper's, side by side in one process.

    python -m bench.search_cost demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

All searches look at the same training images and are held to the same schedule (MGP). The paper's scores up to 100
(attention) or 200 (FFN) random channels a step by a full forward of one batch each, with nothing cached but the
backbone's features. Where that takes too long, `--sample` names the modules that it visits; its seconds and passes are
then those of the modules of each kind, times how many there are of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.environment import environment
from bench.subject import PAPER_BATCH_SIZE, Pruner, Subject, get_subject_parser
from pruning.cost import count_parameters, products_of
from pruning.journal import Decision
from pruning.method import METHODS
from pruning.schedule import MGP, Schedule, role_of
from pruning.search import Search
from pruning.workbench import DetectorBench
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import table
from util.options import parse, real, whole

SUBSET_BATCHES = (40, 20)  # for an attention and for an FFN, as the paper's search looks at
GIGA = 1e9


class WholePasses(DetectorBench):
    """Every pass goes through the whole network behind the backbone, as in the original's search."""

    def begin(self, name: str) -> None:
        """Stay in front of the first module."""


def run_search(
    subject: Subject, search: str, schedule: Schedule, seed: int, sample: Sequence[str], macs: tuple[float, float]
) -> dict[str, Any]:
    """One search from the images to the cut detector: seconds, passes, what is left and its AP on val2017.

    Args:
        sample: modules that the paper's search visits; none means all.
        macs: see `macs_of`.
    """
    is_paper = search == "paper"
    start = time.perf_counter()
    pruner = Pruner(
        subject, METHODS[search], seed, SUBSET_BATCHES, PAPER_BATCH_SIZE if is_paper else 64,
        WholePasses if is_paper else DetectorBench,
    )  # fmt: skip
    ready = time.perf_counter()
    counter, sampled = pruner.bench.counter, is_paper and bool(sample)
    if sampled:
        seconds, images = _extrapolated(pruner, schedule, sample)
        slim, seconds = None, ready - start + seconds
    else:
        slim, _ = pruner.scheduled(schedule)
        seconds, images = time.perf_counter() - start, counter.images
    backbone, behind = macs
    passes = images if is_paper else counter.whole_passes
    return {
        "search": search,
        "seed": seed,
        "sample": list(sample) if sampled else [],
        "seconds": seconds,
        "backbone_images": counter.backbone_images,
        "whole_passes": passes,
        "gmacs": counter.backbone_images * backbone + passes * behind + counter.moment_macs / GIGA,
        "gmacs_original": images * (backbone + behind),
        "removed": None if sampled else 1 - count_parameters(slim.transformer) / subject.params,
        "ap": None if sampled else subject.ap_before_tuning(slim),
        "widths": None if sampled else slim.widths.to_list(),
    }


def _extrapolated(pruner: Pruner, schedule: Schedule, sample: Sequence[str]) -> tuple[float, float]:
    """Seconds and image passes of a search of all modules, from visits to a few of each kind; nothing ran before."""
    bench, counter = pruner.bench, pruner.bench.counter
    counts = Counter(role_of(name) for name in bench.modules)
    visited = Counter(role_of(name) for name in sample)
    if set(visited) != set(counts):
        raise UserError(f"--sample: found {' '.join(visited)}, expected a module of each of {' '.join(counts)}")
    start = time.perf_counter()
    base_ap, marks = bench.full_ap(), [(time.perf_counter(), counter.images)]

    def note(decision: Decision) -> None:
        if decision.accepted:
            marks.append((time.perf_counter(), counter.images))

    bench.modules = {name: module for name, module in bench.modules.items() if name in sample}
    search = Search(bench, schedule, pruner.units, base_ap, note)
    search.run()
    seconds, images = marks[0][0] - start, marks[0][1]
    for name, (before, after) in zip(schedule.order(bench.modules), pairwise(marks), strict=True):
        share = counts[role_of(name)] / visited[role_of(name)]
        seconds, images = seconds + share * (after[0] - before[0]), images + share * (after[1] - before[1])
    return seconds, images


def macs_of(model: nn.Module, image_size_hw: tuple[int, int]) -> tuple[float, float]:
    """GMACs of one image through the backbone, and through all that is behind it."""
    behind = sum(product.macs for product in products_of(model, image_size_hw)) / GIGA
    backbone = model.backbone[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, *image_size_hw), torch.zeros(1, *image_size_hw, dtype=torch.bool))
    return counter.get_total_flops() / 2 / GIGA, behind


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Cells of the table for the searches of one seed."""
    reference = next(result for result in results if result["search"] == "paper")

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    return [
        (
            result["search"], result["seed"], f"{result['seconds']:.0f}",
            f"{reference['seconds'] / result['seconds']:.1f}", f"{result['whole_passes']:.0f}",
            f"{result['gmacs']:.0f}", f"{reference['gmacs'] / result['gmacs']:.1f}",
            f"{reference['gmacs_original'] / result['gmacs']:.1f}", percent(result["removed"]), percent(result["ap"]),
        )
        for result in results
    ]  # fmt: skip


TITLES = ("search", "seed", "seconds", "times as fast", "whole passes", "GMACs", "times fewer",
          "by the original's count", "removed %", "AP")  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    """The options of the benchmark."""
    parser = get_subject_parser("bench.search_cost", __doc__.splitlines()[0], search_images=320)
    add = parser.add_argument
    add("--map_tol", type=real(0, 1), default=MGP.map_tol, help="of the schedule")
    add("--skip", type=real(0, 1), default=MGP.skip, help="of the schedule")
    add("--searches", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="searches to run")
    add("--seeds", type=whole(0), nargs="+", default=[0], help="each search runs once with each")
    add("--sample", nargs="+", default=[], metavar="MODULE", help="modules that the paper's search visits; none: all")
    return parser


def main() -> None:
    """Run the searches, print the table, write the JSON."""
    torch.set_flush_denormal(True)
    args, _ = parse(get_parser())
    if "paper" not in args.searches:
        raise UserError(f"--searches: found {' '.join(args.searches)}, expected paper among them, the reference")
    subject = Subject(args.coco_path, args.checkpoint, 1, args.search_images, batch_size=PAPER_BATCH_SIZE)
    schedule = dataclasses.replace(MGP, map_tol=args.map_tol, skip=args.skip)
    macs = macs_of(subject.dense, subject.image_size_hw)
    results = []
    for seed in args.seeds:
        for search in args.searches:
            results.append(run_search(subject, search, schedule, seed, args.sample, macs))
            print({key: value for key, value in results[-1].items() if key != "widths"}, flush=True)
    print(table(TITLES, [row for seed in args.seeds for row in rows([r for r in results if r["seed"] == seed])]))
    write_json(args.output / f"search_cost_{args.name}.json", {
        "name": args.name, "search_images": args.search_images, "map_tol": args.map_tol, "skip": args.skip,
        "image_size_hw": list(subject.image_size_hw), "gmacs_backbone": macs[0], "gmacs_behind": macs[1],
        "dense_ap": subject.ap_before_tuning(subject.dense),
        "environment": environment(), "results": results,
    })  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
