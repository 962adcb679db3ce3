"""Times of exported budgets by runtime, from `export.py --timings` in the folder of a search or in those below it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.widths import Widths
from tools.export_report import FULL, SLIM, SUMMARY_NAME
from util.errors import UserError, reason_of
from weights.huggingface import weights_digest, weights_file

Setting = tuple[str, ...]  # images, threads, device
Cells = dict[tuple[str, Setting], str]  # (runtime, what it was timed on) -> text


@dataclass(frozen=True)
class ExportTimes:
    """Times in one export.json.

    Attributes:
        path: the file.
        digest: SHA-256 of the checkpoint that was exported; None in files of older versions.
        widths: of the exported detector, which may have fewer layers than its checkpoint; None in such files.
        cells: milliseconds and times as fast as full widths, such as `8.1 (1.45 x)`.
    """

    path: Path
    digest: str | None
    widths: Widths | None
    cells: Cells


def read_times(folder: Path) -> list[ExportTimes]:
    """Read each export.json with times.

    Raises:
        UserError: a file is damaged.
    """
    found = []
    for path in [*sorted(folder.glob(f"*/{SUMMARY_NAME}")), *folder.glob(SUMMARY_NAME)]:
        try:
            content = json.loads(path.read_bytes())
            if not content.get("timings"):
                continue
            checkpoint, widths = content.get("checkpoint"), content.get("widths")
            found.append(
                ExportTimes(
                    path,
                    None if checkpoint is None else str(checkpoint["sha256"]),
                    None if widths is None else Widths.parse(widths),
                    _cells(content["timings"], str(content["environment"]["device"])),
                )
            )
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, UserError,
        ) as error:  # fmt: skip
            raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected what export.py writes") from None
    return found


def _cells(rows: Sequence[Mapping[str, Any]], device: str) -> Cells:
    own = SLIM if any(row["detector"] == SLIM for row in rows) else FULL
    found = {}
    for row in rows:
        if row["detector"] == own:
            height, width = (int(side) for side in row["image_size_hw"])
            setting = (f"{int(row['images'])} x {height} x {width}", f"CPU threads: {int(row['threads'])}", device)
            ratio = f" ({float(row['speed_up']):.2f} x)" if own == SLIM else ""
            found[str(row["runtime"]), setting] = f"{float(row['milliseconds']):.4g}{ratio}"
    return found


def runtime_columns(
    folder: Path, detectors: Sequence[tuple[Path | None, Widths]]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return a table's columns with the times of each detector, and sentences about them.

    Times belong to the detector whose checkpoint has the recorded digest, at the recorded widths. Times on other images
    or machines stand in other columns.

    Args:
        folder: of the search.
        detectors: checkpoint, if its path is known, and widths in the scope `detector`.

    Raises:
        UserError: a file is damaged.
    """
    times = read_times(folder)
    digests = [_digest(path) if times else None for path, _ in detectors]
    cells: list[Cells] = [{} for _ in detectors]
    unused = []
    for of_file in times:
        places = [
            place
            for place, (digest, (_, widths)) in enumerate(zip(digests, detectors, strict=True))
            if digest is not None and (digest, widths) == (of_file.digest, of_file.widths)
        ]
        for place in places:
            cells[place] |= of_file.cells
        if not places:
            unused.append(str(of_file.path.relative_to(folder)))
    keys = list(dict.fromkeys(key for of_detector in cells for key in of_detector))
    # What is alike stands below the table, what differs in the headings.
    alike = [
        values.pop() for values in map(set, zip(*(setting for _, setting in keys), strict=True)) if len(values) < 2
    ]
    columns = {
        ", ".join(["ms", runtime, *(part for part in setting if part not in alike)]): tuple(
            of_detector.get((runtime, setting), "") for of_detector in cells
        )
        for runtime, setting in keys
    }
    notes = []
    if columns:
        source = " for ".join(filter(None, [SUMMARY_NAME, ", ".join(alike)]))
        notes.append(
            f"Milliseconds by runtime are from {source}; in brackets, times as fast as {FULL} with as many layers and "
            "queries."
        )
    if unused:
        notes.append(f"Times of other detectors, or of an older version, are left out: {', '.join(unused)}.")
    return columns, notes


def _digest(path: Path | None) -> str | None:
    """Return the digest of a checkpoint; None if it is no longer there."""
    try:
        if path is None:
            return None
        return weights_digest(weights_file(path) if path.is_dir() else path)
    except (OSError, UserError):
        return None
