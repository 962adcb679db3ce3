"""Table and sentence of docs/results.md about recipes of fine-tuning, for `bench.pages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def _sets(results: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of each data set."""
    return {name: read_figures(results, f"finetune_{name}.json") for name in QUALITY_SETS}


def finetune(results: Path) -> str:
    """Show AP as cut and after each training, a column for each detector."""
    rows = []
    for name, found in _sets(results).items():
        cells: dict[str, dict[str, str]] = {"as cut": {cut: points(of["AP"]) for cut, of in found["cut"].items()}}
        for row in found["rows"]:
            if row["finished"]:
                label = row["name"].removeprefix(f"{row['subject']}: ")
                if label.startswith("distilled"):
                    label = f"lr {row['options']['lr']}, {label}"
                cells.setdefault(label, {})[row["subject"]] = points(row["ap"])
        labels = ["as cut", *sorted(label for label in cells if label != "as cut")]
        rows += [(TITLES[name], label, *(cells[label].get(subject, "") for subject in SUBJECTS)) for label in labels]
    return markdown(("", "", *SUBJECTS.values()), rows)


def finetune_text(results: Path) -> str:
    """Describe the trainings."""
    parts = []
    for name, found in _sets(results).items():
        images = "" if found["images"] is None else f" over {found['images']:,} images"
        title = TITLES[name][0].upper() + TITLES[name][1:]
        parts.append(f"{title}: {found['epochs']} epochs{images}. {measured_with(found)}")
    return paragraph(
        "AP of the averaged weights at the end, one run each, one seed; the column *dense* is the unpruned detector "
        f"trained on by the same recipe. {' '.join(parts)}"
    )


def finetune_headline(results: Path) -> str:
    """Compare the best trainings of the dense and of a slim detector, for the README."""
    found = _sets(results)["demo"]
    dense, slim = (
        max((row for row in found["rows"] if row["subject"] == subject and row["finished"]), key=lambda row: row["ap"])
        for subject in ("dense", "slim47")
    )
    rates = " and ".join(row["options"]["lr"] for row in (slim, dense))
    teacher = ", with the dense one as teacher," if "distill_queries" in slim["options"] else ""
    return paragraph(
        f"With {found['images']:,} training images of the demo set and {found['epochs']} epochs{teacher} the detector "
        f"with 47 % of the transformer's parameters removed goes from {points(found['cut']['slim47']['AP'])} AP as cut "
        f"to {points(slim['ap'])}. The dense one has {points(found['cut']['dense']['AP'])} there, and "
        f"{points(dense['ap'])} after as many epochs (learning rates {rates})."
    )


FINETUNE_TABLES: Mapping[str, Callable[[Path], str]] = {"finetune": finetune}
FINETUNE_TEXTS: Mapping[str, Callable[[Path], str]] = {
    "finetune": finetune_text,
    "finetune_headline": finetune_headline,
}
