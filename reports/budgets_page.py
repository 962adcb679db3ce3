"""The part of a search's report that compares several budgets: what each costs, loses and is used with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.annotations import category_names
from datasets.coco import CocoDataset, build_dataset, split_of
from datasets.coco_eval import shown
from models.detector import Detector
from models.widths import Widths
from reports import charts, page, search_log
from reports.budget_images import Findings, category_changes, find, worst_images
from reports.budget_runtimes import runtime_columns
from reports.folder import RunFolder, model_with
from reports.samples import SPLIT, THRESHOLD, Samples, annotated, captioned
from util.errors import UserError

NAMED_LOSSES = 3
WORST_IMAGES = 3
BEFORE = "before"  # name of the point before the search


@dataclass(frozen=True)
class BudgetComparison:
    """Findings of each detector by the point's name, on the same images of `dataset`; `names` are its categories."""

    dataset: CocoDataset
    names: Mapping[int, str]
    findings: Mapping[str, Findings]


def budgets_section(
    folder: RunFolder, points: Sequence[Mapping[str, Any]], before: Widths, use_dn: bool, samples: Samples
) -> str:
    """Return the table, the plots and a part to open for each budget; empty for one budget.

    Args:
        points: figures of the detector before the search and of each budget; see `runs.search_results`.
        before: widths before the search.
    """
    if not points:
        return ""
    note = ""
    try:
        compared = _compare(folder, points, samples)
    except UserError as error:
        compared, note = None, page.paragraph(f"Not compared on {SPLIT}: {error}.", "faint")
    curves = search_log.ap_curves(points).values()
    return page.section(
        "Budgets",
        page.paragraph("Choose a budget to see its commands, what each category loses, and the images that got worse."),
        _table(folder, points, before, compared),
        note,
        page.plots([(f"AP against {axis}", charts.curve(found, axis)) for axis, found in curves]),
        *(_budget(folder, point, use_dn, compared) for point in points if point["file"]),
    )


def _compare(folder: RunFolder, points: Sequence[Mapping[str, Any]], samples: Samples) -> BudgetComparison:
    """Run all detectors on the first images of val2017.

    Raises:
        UserError: the data, a checkpoint or the file of the detector before the search is missing.
    """
    dataset = build_dataset(SPLIT, folder.data)
    resume = folder.first_resume
    if resume is None:
        raise UserError("the checkpoint that the search began with was not recorded")
    findings = {
        point["name"]: find(samples, _path_of(folder, point) or Path(resume), folder.detector, dataset)
        for point in points
    }
    return BudgetComparison(dataset, category_names(split_of(folder.data, SPLIT).annotation_file), findings)


def _path_of(folder: RunFolder, point: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint of a point; None if it is not known."""
    if point["file"]:
        return folder.path / point["file"]
    return None if folder.first_resume is None else Path(folder.first_resume)


def _table(
    folder: RunFolder, points: Sequence[Mapping[str, Any]], before: Widths, compared: BudgetComparison | None
) -> str:
    """Return the table with a row for each detector; names lead to the parts below."""
    columns = dict(zip(search_log.POINT_COLUMNS, zip(*search_log.point_rows(points), strict=True), strict=True))
    columns["budget"] = tuple(
        page.link(point["name"], anchor_of(point["name"])) if point["file"] else point["name"] for point in points
    )
    models = [model_with(folder.detector, _widths_of(point, before)) for point in points]
    columns["MB"] = tuple(f"{megabytes_of(model):.1f}" for model in models)
    if compared is not None:
        count = len(next(iter(compared.findings.values())).results)
        columns[f"AP, {count} images of {SPLIT}"] = tuple(shown(compared.findings[p["name"]].ap) for p in points)
    notes = ["MB are those of the weights in float32."]
    detectors = [
        (_path_of(folder, point), model.widths_in("detector")) for point, model in zip(points, models, strict=True)
    ]
    try:
        of_runtimes, about = runtime_columns(folder.path, detectors)
        columns, notes = {**columns, **of_runtimes}, [*notes, *about]
    except UserError as error:
        notes.append(f"No times by runtime: {error}.")
    columns = {name: cells for name, cells in columns.items() if any(cell != "" for cell in cells)}
    return page.html_table([*columns], zip(*columns.values(), strict=True)) + page.paragraph(" ".join(notes), "faint")


def _widths_of(point: Mapping[str, Any], before: Widths) -> Widths:
    return Widths.parse(point["widths"]) if "widths" in point else before


def megabytes_of(model: Detector) -> float:
    """Return the megabytes of parameters and buffers in float32, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def anchor_of(name: str) -> str:
    """Return the id of a budget's part of the page."""
    return f"budget-{name}"


def _budget(folder: RunFolder, point: Mapping[str, Any], use_dn: bool, compared: BudgetComparison | None) -> str:
    """Return the part of one budget, to open."""
    path = folder.path / point["file"]
    ap = f"mAP {point['ap']:.4f}"
    parts = [
        page.paragraph("Transplant and fine-tune:"),
        page.code(search_log.next_command(folder.detector.modelname, folder.data, use_dn, path)),
        page.paragraph("Use it as cut: export it, or write a folder to share."),
        page.code(
            f"python export.py --resume {shlex.quote(str(path))} --output_dir "
            f"{shlex.quote(str(folder.path / f'export_{path.stem}'))}"
        ),
        page.code(
            f"python -m weights.save_pretrained {shlex.quote(str(path))} "
            f"{shlex.quote(str(folder.path / f'shared_{path.stem}'))}"
        ),
    ]
    if compared is not None:
        before, after = compared.findings[BEFORE], compared.findings[point["name"]]
        parts += [_categories(before, after, compared.names), *_worst(before, after, compared)]
    title = f"{point['name']}: {point['file']}, {search_log.kept_cost(point)} kept, {ap}"
    return page.details(title, *parts, anchor=anchor_of(point["name"]))


def _categories(before: Findings, after: Findings, names: Mapping[int, str]) -> str:
    changes = category_changes(before, after)
    losses = [
        f"{names.get(number, number)} {100 * (now - was):+.1f}"
        for number, was, now in changes[:NAMED_LOSSES]
        if now < was
    ]
    text = f"Largest losses, in AP points: {', '.join(losses)}." if losses else "No category loses AP."
    rows = [(names.get(number, number), was, now, f"{100 * (now - was):+.1f}") for number, was, now in changes]
    table = page.html_table(("category", "AP before", "AP", "change in points"), rows)
    images = f"{len(before.results)} images of {SPLIT}"
    return page.paragraph(text) + page.details(f"AP of each category, {images}", table)


def _worst(before: Findings, after: Findings, compared: BudgetComparison) -> list[str]:
    """Return the images with most additional errors, as annotated, before and now."""
    worst = worst_images(before, after, WORST_IMAGES)
    what = f"missed objects plus detections of nothing, at scores of {THRESHOLD} or more"
    if not worst:
        return [page.paragraph(f"No image has more errors than before ({what}).")]
    found = [page.paragraph(f"Images with most additional errors ({what}):")]
    for index, added in worst:
        picture = compared.dataset.picture(index)
        columns = [
            ("annotated", annotated(compared.dataset, index), None),
            (f"before, {before.errors[index]} errors", before.results[index], THRESHOLD),
            (f"now, {before.errors[index] + added} errors", after.results[index], THRESHOLD),
        ]
        found.append(page.pictures(captioned(picture, compared.names, *column) for column in columns))
    return found
