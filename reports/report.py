"""report.html: what a run of a search or a training was, found and cost, in one file that asks for nothing else.

    python -m reports OUTPUT_DIR

makes it anew from the files that the run left in its folder, of an older version of the program too.
"""

from __future__ import annotations

from pathlib import Path

from reports.samples import Samples
from reports.search_page import search_page
from reports.training_page import training_page
from util.errors import reason_of
from util.files import write_text
from util.logging import get_logger

REPORT_NAME = "report.html"


def render(folder: Path, kind: str, samples: Samples) -> str:
    """The report as HTML.

    Args:
        folder: output folder of the run.
        kind: search or training.
        samples: what draws the sample detections.

    Raises:
        UserError: the folder lacks what a run of that kind leaves, or it cannot be read.
    """
    pages = {"search": search_page, "training": training_page}
    return pages[kind](folder, samples)


def write_report(folder: Path, kind: str, samples: Samples) -> None:
    """Write report.html; call it in the main process alone, when everything else of the run is on disk.

    Whatever goes wrong is a warning in the log: a report can be made later, a run that is done must not be lost.
    """
    try:
        write_text(folder / REPORT_NAME, render(folder, kind, samples))
    except Exception as error:
        get_logger().warning(
            "%s was not written (%s: %s); python -m reports %s tries again",
            folder / REPORT_NAME, type(error).__name__, reason_of(error), folder,
        )  # fmt: skip
