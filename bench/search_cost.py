"""What a search costs: this package's own against the paper's, side by side in one process.

    python -m bench.search_cost demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

All searches look at the same training images and are held to the same schedule (MGP). The paper's scores up to 100
(attention) or 200 (FFN) random channels a step by a full forward of one batch, only the backbone cached; that is
`--search paper` without the cached states and shared forwards, so passes are counted as whole ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.subject import Pruner, Subject, get_subject_parser
from pruning.cost import count_parameters, products_of
from pruning.method import METHODS
from pruning.schedule import MGP, Schedule
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import table
from util.options import parse, real, whole

SUBSET_BATCHES = (40, 20)  # for an attention and for an FFN, as the paper's search looks at
BATCH_SIZE = 8
GIGA = 1e9


def run_search(subject: Subject, search: str, schedule: Schedule, seed: int) -> dict[str, Any]:
    """One search from the images to the cut detector: seconds, passes, what is left and its AP on val2017."""
    start = time.perf_counter()
    pruner = Pruner(subject, METHODS[search], seed, SUBSET_BATCHES)
    slim, _ = pruner.scheduled(schedule)
    seconds = time.perf_counter() - start
    return {
        "search": search,
        "seed": seed,
        "seconds": seconds,
        "passes": pruner.bench.counter.to_dict(),
        "removed": 1 - count_parameters(slim.transformer) / subject.params,
        "ap": subject.ap_before_tuning(slim),
        "widths": slim.widths.to_list(),
    }


def macs_of(model: nn.Module, image_size_hw: tuple[int, int]) -> tuple[float, float]:
    """GMACs of one image through the backbone, and through all that is behind it."""
    behind = sum(product.macs for product in products_of(model, image_size_hw)) / GIGA
    backbone = model.backbone[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, *image_size_hw), torch.zeros(1, *image_size_hw, dtype=torch.bool))
    return counter.get_total_flops() / 2 / GIGA, behind


def account(result: dict[str, Any], backbone: float, behind: float) -> dict[str, Any]:
    """The result with its multiply-accumulates in 1e9, as run and as the original would count them."""
    passes = result["passes"]
    as_run = passes["backbone_images"] * backbone + passes["whole_passes"] * behind
    return {**result, "gmacs": as_run, "gmacs_original": passes["images"] * (backbone + behind),
            "gmacs_whole_passes": passes["backbone_images"] * backbone + passes["images"] * behind}  # fmt: skip


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Cells of the table; the paper's search counts every image as a whole pass, as the original runs it."""
    reference = next(result for result in results if result["search"] == "paper")
    found = []
    for result in results:
        gmacs = result["gmacs_whole_passes"] if result is reference else result["gmacs"]
        found.append(
            (
                result["search"], f"{result['seconds']:.0f}", f"{reference['seconds'] / result['seconds']:.1f}",
                f"{gmacs:.0f}", f"{reference['gmacs_whole_passes'] / gmacs:.1f}",
                f"{reference['gmacs_original'] / gmacs:.1f}",
                f"{100 * result['removed']:.1f} %", f"{100 * result['ap']:.1f}",
            )
        )  # fmt: skip
    return found


def get_parser() -> argparse.ArgumentParser:
    """The options of the benchmark."""
    parser = get_subject_parser("bench.search_cost", __doc__.splitlines()[0], search_images=320)
    add = parser.add_argument
    add("--map_tol", type=real(0, 1), default=MGP.map_tol, help="of the schedule")
    add("--skip", type=real(0, 1), default=MGP.skip, help="of the schedule")
    add("--searches", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="searches to run")
    add("--seeds", type=whole(1), default=1, help="runs of each search")
    return parser


def main() -> None:
    """Run the searches, print the table, write the JSON."""
    torch.set_flush_denormal(True)
    args, _ = parse(get_parser())
    if "paper" not in args.searches:
        raise UserError(f"--searches: found {' '.join(args.searches)}, expected paper among them, the reference")
    subject = Subject(args.coco_path, args.checkpoint, 1, args.search_images, batch_size=BATCH_SIZE)
    schedule = dataclasses.replace(MGP, map_tol=args.map_tol, skip=args.skip)
    macs = macs_of(subject.dense, subject.image_size_hw)
    results = []
    for seed in range(args.seeds):
        for search in args.searches:
            results.append(account(run_search(subject, search, schedule, seed), *macs))
            print({key: value for key, value in results[-1].items() if key not in ("passes", "widths")}, flush=True)
    titles = ("search", "seconds", "times as fast", "GMACs", "times fewer", "by the original's count", "removed", "AP")
    print(table(titles, [row for seed in range(args.seeds) for row in rows([r for r in results if r["seed"] == seed])]))
    write_json(args.output / f"search_cost_{args.name}.json", {
        "name": args.name, "search_images": args.search_images, "map_tol": args.map_tol, "skip": args.skip,
        "dense_ap": subject.ap_before_tuning(subject.dense), "torch": torch.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "results": results,
    })  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
