"""Compare the cost of this package's searches with that of the paper's, side by side in one process.

    python -m bench.search_cost demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

All searches use the same training images and the same schedule (MGP). The paper's scores up to 100 (attention) or 200
(FFN) random channels per step by a full forward of one batch each; only the backbone's features are cached. CPU seconds
are those of this process, which other work on the machine hardly changes.

If the paper's search would take days, `--sample` names modules of which only the first `--sample_steps` steps are run.
Each pass goes through the whole network, so a step costs the same for every attention and for every FFN. The whole
search is estimated as the steps to the published widths, plus mAP of all images once for each module.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.published import MGP_WIDTHS
from bench.subject import PAPER_BATCH_SIZE, Pruner, Subject, get_subject_parser
from pruning.cost import count_parameters, products_of
from pruning.method import METHODS
from pruning.schedule import MGP, Schedule
from pruning.search import Search
from pruning.workbench import DetectorBench
from util.cli import parse, real, whole
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import table

SUBSET_BATCHES = (40, 20)  # for an attention and for an FFN, as in the paper's search
GIGA = 1e9


class WholePasses(DetectorBench):
    """Runs every pass through the whole network after the backbone, as the original search does."""

    def begin(self, name: str) -> None:
        """Stay at the first module."""


def run_search(
    subject: Subject,
    search: str,
    schedule: Schedule,
    seed: int,
    sample: tuple[Sequence[str], int],
    macs: tuple[float, float],
) -> dict[str, Any]:
    """Run one search from the images to the cut detector; return seconds, passes, removed share and AP on val2017.

    Args:
        sample: modules of the paper's search to sample and number of steps; without modules it runs to its end.
        macs: see `macs_of`.
    """
    is_paper = search == "paper"
    start, cpu_start = time.perf_counter(), time.process_time()
    pruner = Pruner(
        subject, METHODS[search], seed, SUBSET_BATCHES, PAPER_BATCH_SIZE if is_paper else 64,
        WholePasses if is_paper else DetectorBench,
    )  # fmt: skip
    cpu_ready = time.process_time()
    counter, sampled = pruner.bench.counter, is_paper and bool(sample[0])
    if sampled:
        cpu_seconds, images = _extrapolated(pruner, schedule, *sample)
        slim, cpu_seconds = None, cpu_ready - cpu_start + cpu_seconds
    else:
        slim, _ = pruner.scheduled(schedule)
        cpu_seconds, images = time.process_time() - cpu_start, counter.images
    backbone, behind = macs
    passes = images if is_paper else counter.whole_passes
    return {
        "search": search,
        "seed": seed,
        "sample": list(sample[0]) if sampled else [],
        "sample_steps": sample[1] if sampled else None,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": time.perf_counter() - start,
        "backbone_images": counter.backbone_images,
        "whole_passes": passes,
        "gmacs": counter.backbone_images * backbone + passes * behind + counter.moment_macs / GIGA,
        "gmacs_original": images * (backbone + behind),
        "removed": None if sampled else 1 - count_parameters(slim.transformer) / subject.params,
        "ap": None if sampled else subject.ap_before_tuning(slim),
        "widths": None if sampled else slim.widths.to_list(),
    }


def _extrapolated(pruner: Pruner, schedule: Schedule, sample: Sequence[str], steps: int) -> tuple[float, float]:
    """Estimate CPU seconds and image passes of a search to the published widths from a few modules' first steps."""
    bench, counter, modules = pruner.bench, pruner.bench.counter, pruner.bench.modules
    kinds = {modules[name].is_attention for name in sample if name in modules}
    if kinds != {True, False} or set(sample) - set(modules) or modules.keys() != dict(MGP_WIDTHS.items()).keys():
        raise UserError(f"--sample: found {' '.join(sample)}, expected an attention and an FFN of 6 + 6 layers")

    def spent() -> np.ndarray:
        return np.array((time.process_time(), counter.images))

    before = spent()
    base_ap, of_a_step = bench.full_ap(), defaultdict(list)
    of_full_ap = spent() - before
    for name in schedule.order(sample):
        bench.modules = {name: modules[name]}
        marks = [spent()]
        with suppress(_Enough):
            Search(bench, schedule, pruner.units, base_ap, lambda _, marks=marks: _note(marks, spent(), steps)).run()
        of_a_step[modules[name].is_attention] += [after - before for before, after in pairwise(marks)]
        modules[name].set_gate(None)
    bench.modules, total = modules, of_full_ap
    for name, module in modules.items():
        count = MGP_WIDTHS.of(name) / pruner.units.channels(module)
        total = total + count * np.mean(of_a_step[module.is_attention], axis=0) + of_full_ap
    return float(total[0]), float(total[1])


class _Enough(Exception):
    """Raised after the requested number of steps."""


def _note(marks: list[np.ndarray], mark: np.ndarray, steps: int) -> None:
    marks.append(mark)
    if len(marks) > steps:
        raise _Enough


def macs_of(model: nn.Module, image_size_hw: tuple[int, int]) -> tuple[float, float]:
    """Return the GMACs of one image through the backbone, and through the rest of the network."""
    behind = sum(product.macs for product in products_of(model, image_size_hw)) / GIGA
    backbone = model.backbone[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, *image_size_hw), model.stages)
    return counter.get_total_flops() / 2 / GIGA, behind


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Return the rows of the table for the searches of one seed."""
    reference = next(result for result in results if result["search"] == "paper")

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    return [
        (
            result["search"], result["seed"], f"{result['cpu_seconds']:.0f}",
            f"{reference['cpu_seconds'] / result['cpu_seconds']:.1f}", f"{result['whole_passes']:.0f}",
            f"{result['gmacs']:.0f}", f"{reference['gmacs'] / result['gmacs']:.1f}",
            f"{reference['gmacs_original'] / result['gmacs']:.1f}", percent(result["removed"]), percent(result["ap"]),
        )
        for result in results
    ]  # fmt: skip


TITLES = ("search", "seed", "CPU seconds", "times as fast", "whole passes", "GMACs", "times fewer",
          "by the original's count", "removed %", "AP")  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = get_subject_parser("bench.search_cost", __doc__, search_images=320)
    add = parser.add_argument
    add("--map_tol", type=real(0, 1), default=MGP.map_tol, help="allowed fall of mAP, as a fraction")
    add("--skip", type=real(0, 1), default=MGP.skip, help="allowed fall of the subset's mAP, as a fraction")
    add("--searches", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="searches to run")
    add("--seeds", type=whole(0), nargs="+", default=[0], help="seeds to run each search with")
    add("--sample", nargs="+", default=[], metavar="MODULE", help="modules from whose first steps the cost of "
        "the paper's search is estimated; none runs all of it")  # fmt: skip
    add("--sample_steps", type=whole(1), default=1, help="steps of each of these modules")
    return parser


def main() -> None:
    """Run the searches, print the table and write the JSON."""
    torch.set_flush_denormal(True)
    args, _ = parse(get_parser())
    if "paper" not in args.searches:
        raise UserError(f"--searches: found {' '.join(args.searches)}, expected paper, the reference, among them")
    subject = Subject(args.coco_path, args.checkpoint, 1, args.search_images, batch_size=PAPER_BATCH_SIZE)
    schedule = dataclasses.replace(MGP, map_tol=args.map_tol, skip=args.skip)
    macs = macs_of(subject.dense, subject.image_size_hw)
    dense_ap, results = subject.ap_before_tuning(subject.dense), []
    for seed in args.seeds:
        for search in args.searches:
            results.append(run_search(subject, search, schedule, seed, (args.sample, args.sample_steps), macs))
            print({key: value for key, value in results[-1].items() if key != "widths"}, flush=True)
            # Write after each search, since the paper's takes long.
            write_json(args.output / f"search_cost_{args.name}.json", {
                "name": args.name, "search_images": args.search_images, "map_tol": args.map_tol, "skip": args.skip,
                "image_size_hw": list(subject.image_size_hw), "gmacs_backbone": macs[0], "gmacs_behind": macs[1],
                "dense_ap": dense_ap, "environment": environment(), "results": results,
            })  # fmt: skip
    print(table(TITLES, [row for seed in args.seeds for row in rows([r for r in results if r["seed"] == seed])]))


if __name__ == "__main__":
    run_cli(main)
