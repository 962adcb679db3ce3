"""The text log of a run, on the screen and in a file, and text tables."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from util import distributed
from util.colour import paint
from util.errors import one_line

LOGGER_NAME = "dn_detr_pruning"
Notice = tuple[int, str]  # logging level, and a sentence about the data of a run
HEADING = re.compile(r"^.+(?=\n-+(  -+)*$)", re.MULTILINE)  # a table's header line


class _ScreenFormatter(logging.Formatter):
    """Colour warnings, errors and table headers on terminals only; messages in files have no colours."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            return paint(text, "red" if record.levelno >= logging.ERROR else "yellow", sys.stdout)
        return HEADING.sub(lambda heading: paint(heading[0], None, sys.stdout, attrs=("bold",)), text)


class _TqdmHandler(logging.Handler):
    """Print to stdout above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log file that warns once if it cannot be written; only the run's own files may end a run on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.handleError = lambda record: None
        print(f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]})", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing retries the failed write
            super().close()


def get_logger() -> logging.Logger:
    """Return the run's logger; all processes but the first log only warnings and errors."""
    logger = logging.getLogger(LOGGER_NAME)
    if not logger.handlers:
        handler = _TqdmHandler()
        handler.setFormatter(_ScreenFormatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    return logger


def show(notices: Iterable[Notice]) -> None:
    """Log notices in the first process; call it in any process."""
    if distributed.is_main():
        for level, text in notices:
            get_logger().log(level, "%s", text)


def log_to_file(path: str | Path, shown: Iterable[Notice] = ()) -> logging.Handler | None:
    """Also append the log to `path`, with times; return the handler (None in all processes but the first).

    `shown` are notices that were logged earlier and are added to the file.
    """
    if not distributed.is_main():
        return None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    get_logger().addHandler(handler)
    for level, text in shown:
        handler.handle(logging.LogRecord(LOGGER_NAME, level, "", 0, text, None, None))
    return handler


def stop_logging_to_file(handler: logging.Handler | None) -> None:
    """Undo `log_to_file`."""
    if handler is not None:
        get_logger().removeHandler(handler)
        handler.close()


def bar_off(progress: bool = True) -> bool | None:
    """Return tqdm's `disable`: None in the first process, so that only terminals show the bar, else True."""
    return None if progress and distributed.is_main() else True


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a text table: first column left-aligned, others right-aligned, floats with 4 decimals, a line per row."""
    cells = [
        [f"{cell:.4f}" if isinstance(cell, float) else one_line(str(cell)) for cell in row] for row in [header, *rows]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
