"""Compare the dense detector, the one as cut and the fine-tuned one of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from datasets.coco import CocoDataset
from models.detector import Detector
from models.folding import folded_copy
from pruning.cost import cost_of
from reports.comparison import COLUMNS, CUT, DENSE, TUNED, Row, read_comparison, table_rows, write_comparison
from util.logging import table
from util.timing import milliseconds_per_image

TIMED_IMAGES = 4  # of val2017, for the milliseconds


class Comparison:
    """What fine-tuning gained; no rows in a run that is no fine-tuning of a search's output or of fewer queries.

    Args:
        folder: of the run.
        dataset: val2017; its first image sets the size of the GMACs, its first few are timed.
        teacher: the dense detector; None if the run has no teacher.
        continuing: take the rows from the folder.

    Raises:
        UserError: the folder's rows cannot be read.
    """

    def __init__(self, folder: Path, dataset: CocoDataset, teacher: Detector | None, *, continuing: bool) -> None:
        self.folder, self.dataset, self.teacher = folder, dataset, teacher
        self.rows = read_comparison(folder) if continuing else []

    def add(self, name: str, model: Detector, stats: Mapping[str, float], epoch: int | None = None) -> None:
        """Add a detector with its COCO metrics, in place of an older one of that name."""
        height, width = self.dataset[0][0].shape[-2:]
        cost = cost_of(model, (height, width))
        row = Row(name, stats["AP"], stats["AP50"], cost.params, cost.detector_gmacs, epoch)
        self.rows = [*(other for other in self.rows if other.name != name), row]

    def write(self) -> None:
        """Write the rows, if there are some."""
        if self.rows:
            write_comparison(self.folder, self.rows)

    def finish(self, tuned: nn.Module) -> str:
        """Time the teacher and the fine-tuned detector on a few images, write the rows, and return them as text."""
        device = next(tuned.parameters()).device
        images = [self.dataset[index][0].to(device) for index in range(min(TIMED_IMAGES, len(self.dataset)))]
        assert isinstance(tuned, Detector)
        models = {TUNED: tuned} if self.teacher is None else {TUNED: tuned, DENSE: self.teacher}
        found = milliseconds_per_image({name: folded_copy(model) for name, model in models.items()}, images)
        found[CUT] = found[TUNED]  # of the same widths
        self.rows = [row.with_milliseconds(found.get(row.name)) for row in self.rows]
        self.write()
        return table(COLUMNS, table_rows(self.rows))
