"""Table and sentence of docs/results.md about recipes of fine-tuning, for `bench.pages`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.sentences import TITLES, measured_with, paragraph
from bench.tables import QUALITY_SETS, markdown, points, read_figures

SUBJECTS = {
    "dense": "dense",
    "slim47": "47 % of the transformer's parameters removed",
    "slim70": "70 % of them removed",
    "whole50": "whole detector, half of the MACs",
}


# The first two are always there.
SET_TITLES = {**TITLES, "bccd_trained": "BCCD, cut from the dense detector trained on at lr 8e-4"}


def _sets(results: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of each data set by its title."""
    return {
        title: read_figures(results, f"finetune_{name}.json")
        for name, title in SET_TITLES.items()
        if name in QUALITY_SETS or (results / f"finetune_{name}.json").exists()
    }


def _label(row: Mapping[str, Any]) -> str:
    """Return the recipe of a training, which others repeat with another seed."""
    label = re.sub(r", seed \d+$", "", row["name"].removeprefix(f"{row['subject']}: "))
    return f"lr {row['options']['lr']}, {label}" if label.startswith("distilled") else label


def _by_recipe(found: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the trainings that ended by recipe and detector, all seeds of one together."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["finished"]:
            groups.setdefault((_label(row), row["subject"]), []).append(row)
    return groups


def _mean(rows: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(row["ap"] for row in rows)


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """Show AP; of several seeds the mean, the least and the largest."""
    if len(rows) == 1:
        return points(_mean(rows))
    aps = [row["ap"] for row in rows]
    return f"{points(_mean(rows))} ({points(min(aps))} to {points(max(aps))})"


def finetune(results: Path) -> str:
    """Show AP as cut and after each training, a column for each detector."""
    rows = []
    for title, found in _sets(results).items():
        cells: dict[str, dict[str, str]] = {"as cut": {cut: points(of["AP"]) for cut, of in found["cut"].items()}}
        for (label, subject), of_recipe in _by_recipe(found).items():
            cells.setdefault(label, {})[subject] = _cell(of_recipe)
        labels = ["as cut", *sorted(label for label in cells if label != "as cut")]
        rows += [(title, label, *(cells[label].get(subject, "") for subject in SUBJECTS)) for label in labels]
    return markdown(("", "", *SUBJECTS.values()), rows)


def finetune_text(results: Path) -> str:
    """Describe the trainings."""
    parts = []
    for title, found in _sets(results).items():
        images = "" if found["images"] is None else f" over {found['images']:,} images"
        commits = list(
            dict.fromkeys(row["commit"][:7] if row.get("commit") else "an older one" for row in found["rows"])
        )
        of_commits = f" The runs are of the commits {', '.join(commits)}." if len(commits) > 1 else ""
        parts.append(
            f"{title[0].upper()}{title[1:]}: {found['epochs']} epochs{images}. {measured_with(found)}{of_commits}"
        )
    return paragraph(
        "AP of the averaged weights at the end. A cell is one run, or the mean of several seeds and their range; the "
        f"column *dense* is the unpruned detector trained on by the same recipe. {' '.join(parts)}"
    )


def finetune_headline(results: Path) -> str:
    """Compare the best recipes of the dense and of a slim detector, for the README."""
    found = _sets(results)[TITLES["demo"]]
    dense, slim = (
        max((rows for (_, of), rows in _by_recipe(found).items() if of == subject), key=_mean)
        for subject in ("dense", "slim47")
    )
    rates = " and ".join(rows[0]["options"]["lr"] for rows in (slim, dense))
    teacher = ", with the dense one as teacher," if "distill_queries" in slim[0]["options"] else ""
    seeds = f", means of {len(slim)} and {len(dense)} seeds" if len(slim) + len(dense) > 2 else ""
    return paragraph(
        f"With {found['images']:,} training images of the demo set and {found['epochs']} epochs{teacher} the detector "
        f"with 47 % of the transformer's parameters removed goes from {points(found['cut']['slim47']['AP'])} AP as cut "
        f"to {points(_mean(slim))}. The dense one has {points(found['cut']['dense']['AP'])} there, and "
        f"{points(_mean(dense))} after as many epochs (learning rates {rates}{seeds})."
    )


FINETUNE_TABLES: Mapping[str, Callable[[Path], str]] = {"finetune": finetune}
FINETUNE_TEXTS: Mapping[str, Callable[[Path], str]] = {
    "finetune": finetune_text,
    "finetune_headline": finetune_headline,
}
