"""Report of a training run, of a dense or a pruned detector."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.coco_eval import STAT_NAMES, shown
from models.widths import Widths
from reports import charts, page
from reports.comparison import COLUMNS, read_comparison, table_rows
from reports.folder import (
    LOG_NAME,
    RunFolder,
    cost_at,
    cost_section,
    duration,
    environment_section,
    image_size_of,
    read_folder,
    read_log,
)  # fmt: skip
from reports.samples import SPLIT, Samples
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint

EPOCH_COLUMNS = ("epoch", "lr", "train_loss", "test_loss", "test_AP", "test_AP50", "train_seconds")


def epoch_rows(epochs: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return a row of `EPOCH_COLUMNS` for each line of log.txt."""

    def cell(line: Mapping[str, Any], name: str) -> object:
        value = line.get(name, "")
        return f"{value:.1e}" if name == "lr" else shown(value) if name in ("test_AP", "test_AP50") else value

    return [[cell(line, name) for name in EPOCH_COLUMNS] for line in epochs]


def training_page(path: Path, samples: Samples) -> str:
    """Return the report of the training run in that folder as HTML.

    Raises:
        UserError: its log holds no epoch or cannot be read.
    """
    epochs = read_log(path / LOG_NAME)
    if not epochs:
        raise UserError(f"{path / LOG_NAME}: found no epoch in it, expected that of a training run")
    folder = read_folder(path, {})
    config = folder.detector
    widths = config.cfgs or config.full_widths
    full = config.full_widths if widths.backbone is None else config.full_widths_with_backbone
    measured = [line for line in epochs if line.get("test_AP") not in (None, -1)]
    best = max(measured, key=lambda line: line["test_AP"], default=None)  # the first of equals, like the checkpoint
    start = folder.first_resume
    title = f"Training of {config.modelname}" if start is None else f"Fine-tuning of {Path(start).name}"
    return page.page(
        title,
        _lead(folder, epochs, best),
        _curves(epochs, measured, best),
        page.section(f"COCO figures on {SPLIT}", _coco_table(measured, best, "test_AP" in epochs[-1])),
        _comparison(path),
        page.section("Epochs", page.html_table(EPOCH_COLUMNS, epoch_rows(epochs))),
        _costs(folder, full, widths),
        samples.section(config, folder.data, _detectors(folder, best)),
        environment_section(folder, _seconds(epochs)),
    )


def _lead(folder: RunFolder, epochs: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> str:
    """Return a summary of the training, and the main figures."""
    options, last = folder.options, epochs[-1]
    asked = options.get("epochs", last["epoch"] + 1)
    start = "from scratch" if folder.first_resume is None else f"from {folder.first_resume}"
    teacher = f", with {options['distill']} as its teacher" if options.get("distill") else ""
    text = f"{folder.detector.modelname}, {start}{teacher}, on train2017 of {folder.data.coco_path}."
    figures = []
    if best is not None:
        figures.append(("best AP", best["test_AP"], f"epoch {best['epoch']}, on {SPLIT}{folder.measured_by}"))
    if last.get("test_AP") not in (None, -1):
        figures.append(("last AP", last["test_AP"], f"epoch {last['epoch']}{folder.measured_by}"))
    figures += [
        ("last training loss", last["train_loss"], f"epoch {last['epoch']}"),
        ("epochs", f"{last['epoch'] + 1} of {asked}", f"batch size {folder.data.batch_size}"),
        ("all parameters", last["n_parameters"], "of the detector trained"),
        ("duration", duration(_seconds(epochs)), "training and evaluation"),
    ]
    unfinished = "" if last["epoch"] + 1 >= asked else (
        "This run has not ended: the figures are those of the epochs so far. Continue with --resume checkpoint.pth."
    )  # fmt: skip
    return "\n".join(
        [page.paragraph(text), page.paragraph(unfinished, "notice") if unfinished else "", page.tiles(figures)]
    )


def _curves(
    epochs: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None
) -> str:
    """Return the plots of losses, AP with the best epoch, and learning rates."""

    def points(key: str, scale: float = 1) -> list[tuple[int, float]]:
        return [(line["epoch"], scale * line[key]) for line in epochs if line.get(key) not in (None, -1)]

    losses = {"training": points("train_loss"), SPLIT: points("test_loss")}
    items = [("Loss", charts.curves({name: found for name, found in losses.items() if found}, "loss"))]
    if best is not None:
        aps = {"AP": points("test_AP", 100), "AP50": points("test_AP50", 100)}
        items.append((f"AP on {SPLIT}", charts.curves(aps, "AP (points)", best=best["epoch"])))
    rates = {"transformer": points("lr"), "backbone": points("lr_backbone")}
    items.append(("Learning rates", charts.curves(rates, "learning rate", log=True)))
    return page.section("Curves", page.plots(items))


def _coco_table(measured: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, is_evaluated: bool) -> str:
    """Return the twelve COCO metrics of the best and the last epoch."""
    if best is None:
        said = f"Not measurable: {SPLIT} has no boxes." if is_evaluated else "Not measured yet."
        return page.paragraph(said, "faint")
    columns = [(f"best, epoch {best['epoch']}", best), (f"last, epoch {measured[-1]['epoch']}", measured[-1])]
    columns = columns[:1] if best is measured[-1] else columns
    rows = [(name, *(shown(line.get(f"test_{name}")) for _, line in columns)) for name in STAT_NAMES]
    return page.html_table(("", *(caption for caption, _ in columns)), rows)


def _comparison(path: Path) -> str:
    """Return the table of what fine-tuning gained; empty for another run."""
    rows = read_comparison(path)
    return page.section("What fine-tuning gained", page.html_table(COLUMNS, table_rows(rows))) if rows else ""


def _costs(folder: RunFolder, full: Widths, widths: Widths) -> str:
    """Return the detector's cost beside that of its dense form, and its widths."""
    size = image_size_of(folder.data, SPLIT)
    before, after = (cost_at(folder.detector, of, size) for of in (full, widths))
    if widths == full:
        return cost_section("dense", before, None, size)
    plots = page.plots(charts.widths_plots(full, widths))
    return cost_section("dense", before, after, size) + page.section(
        "Width of each module", plots, page.code(f"--cfgs '{widths}'")
    )


def _detectors(folder: RunFolder, best: Mapping[str, Any] | None) -> list[tuple[str, Path]]:
    """Return the detectors to compare: the best checkpoint, and its teacher or the pruned start."""
    found = []
    start = folder.first_resume
    if folder.options.get("distill"):
        found.append(("teacher", Path(folder.options["distill"])))
    elif start is not None and Path(start).exists() and _is_search(Path(start), Path(start).stat().st_mtime_ns):
        found.append(("before fine-tuning", Path(start)))
    best_path = folder.path / "checkpoint_best.pth"
    if best is not None and best_path.exists():
        return [*found, (f"trained, epoch {best['epoch']}", best_path)]
    return [*found, ("trained", folder.path / "checkpoint.pth")]


@functools.lru_cache(maxsize=1)  # called after each epoch
def _is_search(path: Path, _modified: int) -> bool:
    return read_checkpoint(path).is_search


def _seconds(epochs: Sequence[Mapping[str, Any]]) -> float:
    return sum(line.get("train_seconds", 0) + line.get("test_seconds", 0) for line in epochs)
