"""Compare ways of pruning at equal parameters by AP before and after fine-tuning.

    python -m bench.quality demo --coco_path COCODIR --checkpoint checkpoints/demo.pth

Searches, calibration and fine-tuning use only train2017; AP is that of val2017. Writes quality_NAME.json after every
row (a second call continues after the existing rows), the table and quality_NAME.png to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.paper_baseline import prune_as_paper
from bench.subject import Built, Pruner, Subject, get_subject_parser, uniform_widths
from bench.torch_pruning_baseline import prune_with_torch_pruning
from pruning.cost import count_parameters
from pruning.method import FAST, VISIT, Method
from pruning.schedule import GP, MGP
from reports.plots import new_figure, save_figure
from util.cli import whole
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import file_digest, write_json
from util.logging import table

FRACTIONS = (0.25, 0.47, 0.70)
AFTER = ("ap_after", "ap_distilled")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to prune.

    Attributes:
        name: in the table.
        build: maps a fraction of the transformer's parameters to remove and a seed to the smaller detector.
        seeds: number of seeds at the middle fraction; 1 if deterministic.
        tuned: whether it is also fine-tuned.
        distilled: whether it is also fine-tuned with the dense detector as teacher.
        fractions: of the transformer's parameters to remove.
    """

    name: str
    build: Callable[[float, int], Built]
    seeds: int = 1
    tuned: bool = False
    distilled: bool = False
    fractions: tuple[float, ...] = FRACTIONS


def rows_of(subject: Subject) -> list[Row]:
    """Return the rows of the table."""
    pruner = functools.lru_cache(maxsize=1)(lambda method, seed=0: Pruner(subject, method, seed))

    def uniform(method: Method) -> Callable[[float, int], Built]:
        return lambda fraction, seed: pruner(method, seed).at_widths(uniform_widths(subject.dense, fraction))

    def torch_pruning(importance: str, ranking: str) -> Callable[[float, int], Built]:
        return lambda fraction, seed: prune_with_torch_pruning(
            subject.dense, list(subject.seen), subject.criterion, fraction, importance=importance, ranking=ranking
        )

    def ranked(ranking: str, fractions: tuple[float, ...], seeds: int = 1) -> list[Row]:
        direction = "backward" if ranking == "elimination" else "once"
        levels = {
            words: Method("bisect", ranking, direction, level, share_sets=False)
            for level, words in (("none", "as cut"), ("output", "refitted"))
        }
        title = f"uniform, {ranking.replace('_', ' ')}"
        return [Row(f"{title}, {words}", uniform(m), seeds, fractions=fractions) for words, m in levels.items()]

    rows = [
        Row("ours", lambda f, _: pruner(FAST).searched(f), tuned=True, distilled=True),
        Row("uniform widths, projected and refitted", uniform(FAST), tuned=True),
    ]
    for importance in ("magnitude", "taylor"):
        for ranking in ("uniform", "global"):
            name = f"Torch-Pruning, {importance}, {ranking}"
            tuned = (importance, ranking) == ("taylor", "uniform")
            rows.append(Row(name, torch_pruning(importance, ranking), tuned=tuned))
    for ranking in ("random", "magnitude", "elimination"):
        rows += ranked(ranking, FRACTIONS, seeds=3 if ranking == "random" else 1)
    # One pass for each channel, or for each image and module, takes minutes, so we measure one fraction.
    for ranking in ("first_order", "fisher", "exact"):
        rows += ranked(ranking, FRACTIONS[1:2])
    shared = Method("bisect", "magnitude", "once", "output", share_sets=True)
    rows.append(Row("uniform, magnitude, refitted, one index set", uniform(shared)))
    rows.append(
        Row(
            "the paper's way, uniform",
            lambda f, seed: prune_as_paper(
                subject.dense, subject.paper_batches, subject.criterion, uniform_widths(subject.dense, f), seed=seed
            ),
            tuned=True,
            fractions=FRACTIONS[1:2],  # each takes 15 minutes, and this one already removes all AP
        )
    )
    return rows


def measure(subject: Subject, row: Row, fraction: float, epochs: int) -> dict[str, Any]:
    """Measure one row at one fraction: mean over its seeds before fine-tuning, the first seed after."""
    start = time.perf_counter()
    seeds = row.seeds if fraction == FRACTIONS[1] else 1
    built = [row.build(fraction, seed) for seed in range(seeds)]
    prune_seconds = (time.perf_counter() - start) / seeds
    aps = [subject.ap_before_tuning(model) for model, _ in built]
    model, info = built[0]
    found = {
        "name": row.name,
        "asked": fraction,
        "removed": 1 - count_parameters(model.transformer) / subject.params,
        "ap_before": statistics.fmean(aps),
        "ap_before_seeds": aps,
        "prune_seconds": prune_seconds,
        "widths": model.widths.to_list(),
        "reached": info.get("reached", True),
    }
    if row.tuned and epochs:
        found["ap_after"] = subject.ap_after_tuning(model, epochs, distilled=False)
    if row.distilled and epochs:
        found["ap_distilled"] = subject.ap_after_tuning(model, epochs, distilled=True)
    return found


def schedules(subject: Subject) -> list[dict[str, Any]]:
    """Measure GP and MGP, and the search by budget at the same parameters."""
    found = []
    for schedule in (GP, MGP):
        eased = dataclasses.replace(schedule, map_tol=0.1, skip=0.01)
        pruner = Pruner(subject, VISIT)
        start = time.perf_counter()
        model, _ = pruner.scheduled(eased)
        removed = 1 - count_parameters(model.transformer) / subject.params
        seconds = time.perf_counter() - start
        slim, _ = pruner.searched(removed)
        for name, one, spent in (
            (schedule.name.upper(), model, seconds),
            (f"budget of {schedule.name.upper()}", slim, None),
        ):
            found.append(
                {
                    "name": name,
                    "removed": 1 - count_parameters(one.transformer) / subject.params,
                    "ap_before": subject.ap_before_tuning(one),
                    "prune_seconds": spent,
                    "widths": one.widths.to_list(),
                }
            )
    return found


def print_table(result: Mapping[str, Any]) -> None:
    """Print AP in points, before and after fine-tuning, for every row and fraction."""
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    cells = []
    for name in names:
        line: list[Any] = [name]
        for fraction in FRACTIONS:
            row = next((r for r in result["rows"] if r["name"] == name and r["asked"] == fraction), None)
            line += ["", "", ""] if row is None else [_before(row), *(_points(row.get(k)) for k in AFTER)]
        cells.append(line)
    titles = [""] + [f"{100 * f:.0f} %{after}" for f in FRACTIONS for after in (" before", " tuned", " distilled")]
    dense = f"dense: {_points(result['dense_ap'])}, fine-tuned alike {_points(result.get('dense_ap_after'))}"
    print(f"{result['name']}, AP in points on val2017; {dense}\n{table(titles, cells)}")
    lines = [(r["name"], f"{100 * r['removed']:.1f} %", _points(r["ap_before"])) for r in result.get("schedules", [])]
    if lines:
        print(table(["search", "removed", "AP before fine-tuning"], lines))


def _points(ap: float | None) -> str:
    return "" if ap is None else f"{100 * ap:.1f}"


def _before(row: Mapping[str, Any]) -> str:
    aps = row["ap_before_seeds"]
    spread = f" ± {50 * (max(aps) - min(aps)):.1f}" if len(aps) > 1 else ""
    reached = "" if row["reached"] else f" (at {100 * row['removed']:.0f} %)"
    return f"{_points(row['ap_before'])}{spread}{reached}"


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Plot AP against the remaining parameters, before and after fine-tuning."""
    figure = new_figure(11, 5)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    for axes, key, title in zip(panels, ("ap_before", "ap_after"), ("before fine-tuning", "after"), strict=True):
        for index, name in enumerate(names):
            rows = [r for r in result["rows"] if r["name"] == name and key in r]
            style = "o-" if name.startswith("ours") else "x--" if "Torch" in name or "paper" in name else ".:"
            axes.plot([100 * r["removed"] for r in rows], [100 * r[key] for r in rows], style,
                      color=f"C{index % 10}", label=name)  # fmt: skip
        axes.axhline(100 * result["dense_ap"], color="grey", zorder=0)
        axes.set_title(f"{result['name']}, {title}", fontsize=10)
        axes.set_xlabel("transformer parameters removed (%)")
    panels[0].set_ylabel("AP (points)")
    panels[0].legend(fontsize=6)
    save_figure(figure, path)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = get_subject_parser("bench.quality", __doc__, search_images=400)
    add = parser.add_argument
    add("--train_images", type=whole(1), default=1000, help="first training images to fine-tune on")
    add("--epochs", type=whole(0), default=1, help="epochs of fine-tuning, 0 for none")
    return parser


def main() -> None:
    """Measure missing rows; print and plot all of them."""
    torch.set_flush_denormal(True)
    args = get_parser().parse_args()
    path = args.output / f"quality_{args.name}.json"
    subject = Subject(args.coco_path, args.checkpoint, args.train_images, args.search_images)
    if not all(module.has_logits for module in subject.dense.prunable_modules().values() if module.is_attention):
        raise UserError(
            f"--checkpoint {args.checkpoint}: found a {subject.options.detector.modelname}, expected a dn_dab_detr, "
            "the only variant that all ways of pruning support"
        )
    settings = {key: getattr(args, key) for key in ("name", "search_images", "train_images", "epochs")}
    settings["checkpoint"] = file_digest(args.checkpoint)
    result: dict[str, Any] = {
        **settings,
        "rows": [],
    }
    if path.is_file():
        older = json.loads(path.read_text())
        result = older if all(older.get(key) == value for key, value in settings.items()) else result
    result["environment"] = environment()
    result["dense_ap"] = subject.ap_before_tuning(subject.dense)
    for row in rows_of(subject):
        for fraction in row.fractions:
            if not any(r["name"] == row.name and r["asked"] == fraction for r in result["rows"]):
                result["rows"].append(measure(subject, row, fraction, args.epochs))
                print(json.dumps({k: v for k, v in result["rows"][-1].items() if k != "widths"}), flush=True)
                write_json(path, result)
        if "dense_ap_after" not in result and args.epochs:
            result["dense_ap_after"] = subject.ap_after_tuning(subject.dense, args.epochs, distilled=False)
    if "schedules" not in result:
        result["schedules"] = schedules(subject)
    write_json(path, result)
    plot(args.output / f"quality_{args.name}.png", result)
    print_table(result)


if __name__ == "__main__":
    run_cli(main)
