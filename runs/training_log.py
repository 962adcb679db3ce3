"""Lines of a training's log.txt, and the tables and figures that it logs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.coco_eval import evaluator_name, shown
from util.files import copy_file, free_name, write_atomic
from util.logging import table


def shown_ap(ap: float | None, is_best: bool) -> str:
    """Return an epoch's AP as text for the log; `ap` is None if it was not evaluated."""
    if ap is None:
        return "not evaluated"
    if ap == -1:
        return "AP not measurable"
    return f"AP {ap:.4f}{' (best)' if is_best else ''}, by {evaluator_name()}"


def epoch_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return an epoch's values under TensorBoard's grouped names, without those that cannot be measured."""
    groups = {"train_": "epoch/", "test_": "val/"}
    scalars = {"epoch/lr": line["lr"], "epoch/lr_backbone": line["lr_backbone"]}
    for name, value in line.items():
        for prefix, group in groups.items():
            if name.startswith(prefix) and value != -1:
                scalars[group + name.removeprefix(prefix)] = value
    return scalars


def category_table(categories: list[dict[str, Any]]) -> str:
    """Return a table of the categories with boxes, and the number of the others."""
    rows = [[c["name"], c["id"], c["boxes"], shown(c["AP"]), shown(c["AP50"])] for c in categories if c["boxes"]]
    without = len(categories) - len(rows)
    left_out = f"\n(and {without} categories without boxes)" if without else ""
    return table(["category", "id", "boxes", "AP", "AP50"], rows) + left_out


def layer_table(stats_by_layer: list[dict[str, float]]) -> str:
    """Return a table of AP after each decoder layer: that of the detector run with `--dec_layers` so many."""
    names = ("AP", "AP50", "AP75")
    rows = [[layers, *(shown(stats[name]) for name in names)] for layers, stats in enumerate(stats_by_layer, 1)]
    return table(["decoder layers", *names], rows)


def continue_log(path: Path, epoch: int) -> None:
    """Remove from a log.txt a line truncated by a crash, and the lines from `epoch` on, which is trained again.

    If that is more than one epoch whose checkpoint a crash prevented, keep a copy of the old file beside it.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = [line for line in lines if _epoch_of(line) < epoch]
    if b"".join(kept) == content:
        return
    if lines[: len(kept)] != kept or any(_epoch_of(line) > epoch for line in lines) or len(lines) > len(kept) + 1:
        copy_file(path, free_name(path))
    write_atomic(path, lambda stream: stream.write(b"".join(kept)))


def _epoch_of(line: bytes) -> float:
    """Return the epoch of a line of log.txt, or minus infinity for a line without one."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return -math.inf
