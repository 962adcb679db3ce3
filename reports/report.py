"""Write report.html: options, results and costs of a search or a training run, in one self-contained file.

    python -m reports OUTPUT_DIR

regenerates it from the files in the run's folder, also for runs of older versions.
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
    """Return the report as HTML.

    Args:
        folder: output folder of the run.
        kind: search or training.
        samples: draws the sample detections.

    Raises:
        UserError: the folder lacks files of such a run, or they cannot be read.
    """
    return {"search": search_page, "training": training_page}[kind](folder, samples)


def write_report(folder: Path, kind: str, samples: Samples) -> None:
    """Write report.html; call it only in the main process, after all other files are written.

    Failures are only logged as warnings: a report can be made later, and must not end a run.
    """
    try:
        write_text(folder / REPORT_NAME, render(folder, kind, samples))
    except Exception as error:
        get_logger().warning(
            "%s was not written (%s: %s); try again with python -m reports %s",
            folder / REPORT_NAME, type(error).__name__, reason_of(error), folder,
        )  # fmt: skip
