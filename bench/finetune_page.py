"""Table and sentence of docs/results.md about recipes of fine-tuning, for `bench.pages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.sentences import measured_with, paragraph
from bench.tables import markdown, points, read_figures

SUBJECTS = {
    "dense": "dense",
    "slim47": "47 % of the transformer's parameters removed",
    "slim70": "70 % of them removed",
    "whole50": "whole detector, half of the MACs",
}


def finetune(results: Path) -> str:
    """Show AP as cut and after each training, a column for each detector."""
    found = read_figures(results, "finetune_bccd.json")
    cells: dict[str, dict[str, str]] = {"as cut": {name: points(cut["AP"]) for name, cut in found["cut"].items()}}
    for row in found["rows"]:
        if row["finished"]:
            label = row["name"].removeprefix(f"{row['subject']}: ")
            cells.setdefault(label, {})[row["subject"]] = points(row["ap"])
    rows = [(label, *(of.get(name, "") for name in SUBJECTS)) for label, of in cells.items()]
    return markdown(("BCCD", *SUBJECTS.values()), rows)


def finetune_text(results: Path) -> str:
    """Describe the trainings."""
    found = read_figures(results, "finetune_bccd.json")
    return paragraph(
        f"AP of the averaged weights after {found['epochs']} epochs, one run each, one seed. The dense detector was "
        f"trained on by the same recipe. {measured_with(found)}"
    )


FINETUNE_TABLES: Mapping[str, Callable[[Path], str]] = {"finetune": finetune}
FINETUNE_TEXTS: Mapping[str, Callable[[Path], str]] = {"finetune": finetune_text}
