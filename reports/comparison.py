"""What fine-tuning gained: the dense detector, the one as cut and the fine-tuned one, side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.coco_eval import shown
from util.errors import UserError, reason_of
from util.files import write_json

COMPARISON_NAME = "comparison.json"
COLUMNS = ("detector", "AP", "AP50", "parameters", "detector GMACs", "ms an image")
DENSE, CUT, TUNED = "dense", "as cut", "fine-tuned"


@dataclass(frozen=True)
class Row:
    """One detector.

    Attributes:
        name: `DENSE` (the teacher), `CUT` or `TUNED`.
        ap, ap50: on val2017 in [0, 1], or -1 if val2017 has no boxes.
        params: parameters of the detector.
        detector_gmacs: of the whole detector, for an image of the first one's size.
        epoch: the epoch of the best AP, counted from 0, after which these weights were saved; None before fine-tuning.
        milliseconds: median time for a single image in float32; None if it was not measured.
    """

    name: str
    ap: float
    ap50: float
    params: int
    detector_gmacs: float
    epoch: int | None = None
    milliseconds: float | None = None

    def with_milliseconds(self, milliseconds: float | None) -> Row:
        """Return the row with a time, rounded."""
        return dataclasses.replace(self, milliseconds=None if milliseconds is None else round(milliseconds, 2))


def table_rows(rows: Sequence[Row]) -> list[list[object]]:
    """Return a row of `COLUMNS` for each detector."""
    return [
        [
            row.name if row.epoch is None else f"{row.name}, epoch {row.epoch}",
            shown(row.ap),
            shown(row.ap50),
            row.params,
            row.detector_gmacs,
            "" if row.milliseconds is None else row.milliseconds,
        ]
        for row in rows
    ]


def write_comparison(folder: Path, rows: Sequence[Row]) -> None:
    """Write comparison.json."""
    write_json(folder / COMPARISON_NAME, [dataclasses.asdict(row) for row in rows])


def read_comparison(folder: Path) -> list[Row]:
    """Read comparison.json; no rows if the run has none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / COMPARISON_NAME
    if not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({reason_of(error)}), expected the detectors of a run as JSON"
        ) from None
