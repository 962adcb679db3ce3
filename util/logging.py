"""What a run says: a text log on the screen and in a file, and tables of figures."""

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
Notice = tuple[int, str]  # level of logging, and a sentence about the data of a run
HEADING = re.compile(r"^.+(?=\n-+(  -+)*$)", re.MULTILINE)  # the line above a table's rule


class _ScreenFormatter(logging.Formatter):
    """Colours for terminals: warnings, errors, headings of tables. Messages have none, so files have none either."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            return paint(text, "red" if record.levelno >= logging.ERROR else "yellow", sys.stdout)
        return HEADING.sub(lambda heading: paint(heading[0], None, sys.stdout, attrs=("bold",)), text)


class _TqdmHandler(logging.Handler):
    """Prints to stdout above a running progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short with one warning: the run's own files tell whether it can go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.handleError = lambda record: None
        print(f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]})", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            super().close()


def get_logger() -> logging.Logger:
    """The run's logger: silent below warnings in every process but the first."""
    logger = logging.getLogger(LOGGER_NAME)
    if not logger.handlers:
        handler = _TqdmHandler()
        handler.setFormatter(_ScreenFormatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    return logger


def show(notices: Iterable[Notice]) -> None:
    """Log notices, which all processes may have, in the first one."""
    if distributed.is_main():
        for level, text in notices:
            get_logger().log(level, "%s", text)


def log_to_file(path: str | Path, shown: Iterable[Notice] = ()) -> logging.Handler | None:
    """Append the log to `path` too, with times; returns the handler (None in all processes but the first).

    `shown` are notices that were logged before there was a file.
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
    """For tqdm's `disable`: None leaves the bar of the first process to terminals, so that log files stay readable."""
    return None if progress and distributed.is_main() else True


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text table: the first column to the left, the others to the right; floats with 4 decimals, a line a row."""
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
