"""Errors that are the user's to mend, and how an entry script reports them."""

import errno
import io
import sys
import unicodedata
from collections.abc import Callable

from util.colour import paint

# What a disk or its owner refuses; any other error of the system is a defect, and its traceback helps.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names file, key or option, what was found and expected."""


def _error_mark() -> str:
    return paint("error:", "red", sys.stderr, attrs=("bold",))


class RunFailedError(RuntimeError):
    """A run that was asked for correctly and has no result: one sentence that says why."""


class NonFiniteLossError(RunFailedError):
    """A loss, a gradient or a detection is infinite or NaN; the message names it, where it came, and the images."""


def one_line(text: str, length: int | None = None) -> str:
    """`text` as it may stand in a sentence, a table or a picture.

    Line ends and the white space around them become one space, control characters and lone surrogates are escaped. With
    `length`, longer texts end in `...` after that many characters.
    """
    text = " ".join(part for line in text.splitlines() if (part := line.strip()))
    text = "".join(map(_printable, text))
    return text if length is None or len(text) <= length else f"{text[:length]}..."


def plain_name(text: str) -> str:
    """The name of a category as it is compared, printed and drawn: `one_line` with all white space collapsed."""
    return one_line(" ".join(text.split()))


def _printable(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs")
    return character.encode("unicode_escape").decode() if is_control else character


def shorten(value: object, length: int = 40) -> str:
    """The `repr` of a value found in a file, for a sentence: one line of at most `length` characters and `...`.

    Every value, key or name of a file that an error quotes goes through it.
    """
    try:
        return one_line(repr(value), length)
    except (ValueError, RecursionError):  # Python writes out no numbers of thousands of digits
        return f"a {type(value).__name__}"


def reason_of(error: Exception, length: int = 120) -> str:
    """The first line of what another library's exception says, or its type where it says nothing, for a sentence."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0], length) if lines else type(error).__name__


def _escape_what_consoles_lack() -> None:
    """Let standard output and errors escape characters that their encoding lacks, which would else end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_cli(main: Callable[[], object]) -> None:
    """Run an entry script; a `UserError`, or a disk that takes no more, becomes one line on stderr and exit code 2.

    A `RunFailedError` is one line, too, and exit code 1.
    """
    _escape_what_consoles_lack()
    try:
        main()
    except UserError as error:
        print(f"{_error_mark()} {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except RunFailedError as error:
        sys.exit(f"{_error_mark()} {one_line(str(error))}")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{one_line(str(error.filename))}: " if error.filename else ""
        print(f"{_error_mark()} {where}{error.strerror}, expected a file that can be read and written", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
