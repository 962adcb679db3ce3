"""Measure what each part of the fast search saves by replacing one part at a time with a plain form.

    python -m bench.search_parts demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

Also prints the rank correlation of first-order scores with the exact losses that they approximate.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from scipy.stats import spearmanr

from bench.subject import PAPER_BATCH_SIZE, Pruner, Subject, cut_in_order, get_subject_parser
from pruning import budget
from pruning.budget import BudgetSearch
from pruning.cost import count_parameters
from pruning.kept_channels import all_kept
from pruning.method import FAST, Method
from pruning.schedule import MGP
from pruning.workbench import DetectorBench
from util.cli import parse, real
from util.environment import environment
from util.errors import run_cli
from util.files import write_json
from util.logging import table

EVERY = 1_000_000  # more than there are widths, images or trials


class RankingAgain(BudgetSearch):
    """Ranks the channels of every module again for each cut, with the modules before it already cut."""

    def _cut(self, widths: Mapping[str, int]) -> dict[str, Any]:
        return cut_in_order(self.bench, widths)


class Bisection(BudgetSearch):
    """Halves the range of budgets seven times, regardless of the trials."""

    def _guess(self, losses: Mapping[float, float], allowed: float, fails: float, passes: float) -> float:
        return (fails + passes) / 2


class MiddleFirst(BudgetSearch):
    """Starts in the middle, regardless of the loss."""

    def _guess(self, losses: Mapping[float, float], allowed: float, fails: float, passes: float) -> float:
        return super()._guess(losses, allowed, fails, passes) if losses else (fails + passes) / 2


def variants(search_images: int) -> dict[str, dict[str, Any]]:
    """Return for each row what differs from the fast search."""
    return {
        "as it is": {},
        "calibrated on all images": {"calibration_images": search_images},
        "every width of an attention measured": {"constants": {"ATTENTION_WIDTHS_MEASURED": EVERY}},
        "channels ranked again for each cut": {"search": RankingAgain},
        "first trial in the middle": {"search": MiddleFirst},
        "budgets halved, seven mAP": {"search": Bisection, "constants": {"EVALUATIONS": 7, "NEAR": 0, "PRECISION": 0}},
        "first-order ranking": {"ranking": "first_order"},
        "random ranking": {"ranking": "random"},
    }


def run_variant(subject: Subject, variant: Mapping[str, Any], map_tol: float) -> dict[str, Any]:
    """Run one search from the images to the cut detector."""
    method = dataclasses.replace(FAST, ranking=variant.get("ranking", FAST.ranking))
    start = time.perf_counter()
    with ExitStack() as constants:
        for name, value in variant.get("constants", {}).items():
            constants.enter_context(mock.patch.object(budget, name, value))
        more = {key: variant[key] for key in ("calibration_images", "search") if key in variant}
        pruner = Pruner(subject, method, **more)
        slim, _ = pruner.scheduled(dataclasses.replace(MGP, map_tol=map_tol))
    return {
        "seconds": time.perf_counter() - start,
        "whole_passes": pruner.bench.counter.whole_passes,
        "removed": 1 - count_parameters(slim.transformer) / subject.params,
        "ap": subject.ap_before_tuning(slim),
    }


def rank_correlations(subject: Subject) -> dict[str, float]:
    """Return for each FFN Spearman's correlation of the loss changes of one batch without each channel and of their
    first-order estimates, both as absolute values.
    """
    changes, loss = {}, 0.0
    for ranking in ("first_order", "exact"):
        method = Method("bisect", ranking, "once", "none", share_sets=False)
        bench: DetectorBench = Pruner(subject, method, calibration_images=PAPER_BATCH_SIZE).bench
        if ranking == "first_order":
            loss = bench.loss  # of the whole detector, on that batch
        for name, module in bench.modules.items():
            if not module.is_attention:
                bench.begin(name)
                kept = all_kept(module)
                score = bench.ranking(module, ("hidden",), kept, kept["hidden"])
                # The exact score of a kept channel is minus the loss without it.
                changes[ranking, name] = score.abs() if ranking == "first_order" else (-score - loss).abs()
    names = [name for ranking, name in changes if ranking == "exact"]
    return {name: float(spearmanr(changes["first_order", name], changes["exact", name])[0]) for name in names}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = get_subject_parser("bench.search_parts", __doc__, search_images=320)
    parser.add_argument("--map_tol", type=real(0, 1), default=MGP.map_tol, help="allowed fall of mAP, as a fraction")
    return parser


def main() -> None:
    """Run the searches, print the table and write the JSON."""
    torch.set_flush_denormal(True)
    args, _ = parse(get_parser())
    subject = Subject(args.coco_path, args.checkpoint, 1, args.search_images, batch_size=PAPER_BATCH_SIZE)
    results: list[dict[str, Any]] = []
    correlations: dict[str, float] = {}

    def save() -> None:
        write_json(args.output / f"search_parts_{args.name}.json", {
            "name": args.name, "search_images": args.search_images, "map_tol": args.map_tol,
            "environment": environment(), "results": results, "rank_correlations": correlations,
        })  # fmt: skip

    for name, variant in variants(args.search_images).items():
        results.append({"name": name, **run_variant(subject, variant, args.map_tol)})
        print(results[-1], flush=True)
        save()
    correlations.update(rank_correlations(subject))
    save()
    first = results[0]
    rows = [
        (r["name"], f"{r['seconds']:.0f}", f"{r['seconds'] / first['seconds']:.1f}", f"{r['whole_passes']:.0f}",
         f"{r['whole_passes'] / first['whole_passes']:.1f}", f"{100 * r['removed']:.1f}", f"{100 * r['ap']:.1f}")
        for r in results
    ]  # fmt: skip
    print(table(("", "seconds", "times", "whole passes", "times", "removed %", "AP"), rows))
    print("rank correlation of first-order scores and exact losses:", {k: round(v, 2) for k, v in correlations.items()})


if __name__ == "__main__":
    run_cli(main)
