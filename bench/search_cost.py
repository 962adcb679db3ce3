"""What a search costs: this package's own against the paper's, side by side in one process.

    python -m bench.search_cost demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

All searches look at the same training images and are held to the same schedule (MGP). The paper's scores up to 100
(attention) or 200 (FFN) random channels a step by a full forward of one batch, only the backbone cached; that is
`--search paper` without the cached states and shared forwards, so passes are counted as whole ones.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.paper_baseline import slim_copy
from bench.quality import CPU, Subject
from pruning.budget import BudgetSearch
from pruning.cost import count_parameters, params_per_channel, products_of, step_shares
from pruning.kept import Kept
from pruning.method import METHODS
from pruning.schedule import MGP, Schedule
from pruning.search import Search, Units
from pruning.transplant import cut_state_dict, slices_of, widths_after
from pruning.workbench import DetectorBench
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import table
from util.options import parse, real, whole

BATCH_SIZE = 8
GIGA = 1e9


def run_search(subject: Subject, search: str, schedule: Schedule, seed: int) -> dict[str, Any]:
    """One search from the images to the cut detector: seconds, passes, what is left and its AP on val2017."""
    start = time.perf_counter()
    model = copy.deepcopy(subject.dense)
    whole_model = copy.deepcopy(model)
    bench = DetectorBench(
        model, subject.criterion, subject.postprocess, subject.seen, subject.seen_truth,
        step_shares(model, subject.image_size_hw), method=METHODS[search], device=CPU,
        batch_numbers=range(len(subject.seen)), subset_batches_attention=40, subset_batches_ffn=20,
        calibration_batches=len(subject.seen), images_at_once=64, seed=seed,
    )  # fmt: skip
    base_ap = bench.full_ap()
    units = Units(1, 4 * model.nheads, 100, 200, seed)
    if search == "fast":
        steps = {name: units.channels(module) for name, module in bench.modules.items()}
        budget = BudgetSearch(
            bench, params_per_channel(whole_model), count_parameters(model.transformer), steps, base_ap
        )
        kept, _ = budget.run(None, schedule.full_threshold_ap(base_ap, len(bench.modules) - 1))
    else:
        kept = Search(bench, schedule, units, base_ap).run()
    seconds = time.perf_counter() - start
    slim = _cut(whole_model, model, bench, kept)
    return {
        "search": search,
        "seed": seed,
        "seconds": seconds,
        "passes": bench.counter.to_dict(),
        "removed": 1 - count_parameters(slim.transformer) / subject.params,
        "ap": subject.ap_before_tuning(slim),
        "search_ap": bench.full_ap(),
        "widths": slim.widths.to_list(),
    }


def _cut(whole_model: nn.Module, model: nn.Module, bench: DetectorBench, kept: Mapping[str, Kept]) -> nn.Module:
    slim = cut_state_dict(model.state_dict(), kept, slices_of(bench.modules))
    return slim_copy(whole_model, slim, widths_after(model.widths, kept))


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
    parser = argparse.ArgumentParser("python -m bench.search_cost", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("name", help="of the data set, as the file shows it")
    add("--coco_path", required=True, help="data set in COCO's layout")
    add("--checkpoint", required=True, help="dense detector")
    add("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    add("--search_images", type=whole(1), default=320, help="first training images to search on")
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
