"""User-facing errors, and how entry scripts report them."""

import errno
import io
import sys
import unicodedata
from collections.abc import Callable

from util.colour import paint

# Errors of a disk or of permissions; any other OSError is a defect and keeps its traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class UserError(Exception):
    """Invalid user input. The message is a sentence: file, key or option, then what was found and expected."""


def _error_mark() -> str:
    return paint("error:", "red", sys.stderr, attrs=("bold",))


class RunFailedError(RuntimeError):
    """A run with valid input that has no result. The message is a sentence with the reason."""


class NonFiniteLossError(RunFailedError):
    """A loss, a gradient or a detection is infinite or NaN. The message names it, the step and the images."""


def one_line(text: str, length: int | None = None) -> str:
    """Return `text` as one line for a sentence, a table or an image.

    Line ends and the white space around them become one space; control characters and lone surrogates are escaped. With
    `length`, longer text is cut after that many characters and ends in `...`.
    """
    text = " ".join(part for line in text.splitlines() if (part := line.strip()))
    text = "".join(map(_printable, text))
    return text if length is None or len(text) <= length else f"{text[:length]}..."


def plain_name(text: str) -> str:
    """Return a category name for comparing, printing and drawing: `one_line` with white space collapsed."""
    return one_line(" ".join(text.split()))


def _printable(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs")
    return character.encode("unicode_escape").decode() if is_control else character


def shorten(value: object, length: int = 40) -> str:
    """Return the `repr` of a value on one line, cut to `length` characters and `...`.

    Use it for every value, key or name from a file that an error quotes.
    """
    try:
        return one_line(repr(value), length)
    except (ValueError, RecursionError):  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__}"


def reason_of(error: Exception, length: int = 120) -> str:
    """Return the first line of another library's exception message or, if that is empty, its type."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0], length) if lines else type(error).__name__


def _escape_what_consoles_lack() -> None:
    """Make stdout and stderr escape characters that their encoding lacks instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_cli(main: Callable[[], object]) -> None:
    """Run an entry script and report errors on one line of stderr.

    The exit code is 2 for a `UserError` or a disk error, 1 for a `RunFailedError` and 130 for Ctrl-C.
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
