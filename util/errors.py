"""Errors that are the user's to mend, and how an entry script reports them."""

import errno
import sys
from collections.abc import Callable

from util.colour import paint

# What a disk or its owner refuses; any other error of the system is a defect, and its traceback helps.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names file, key or option, what was found and expected."""


def _error_mark() -> str:
    return paint("error:", "red", sys.stderr, attrs=("bold",))


class NonFiniteLossError(RuntimeError):
    """A loss, a gradient or a detection is infinite or NaN; the message names it, where it came, and the images."""


def shorten(value: object, length: int = 40) -> str:
    """The `repr` of a value for a sentence, cut to `length` characters."""
    try:
        return repr(value)[:length]
    except (ValueError, RecursionError):  # Python writes out no numbers of thousands of digits
        return f"a {type(value).__name__}"


def run_cli(main: Callable[[], object]) -> None:
    """Run an entry script; a `UserError`, or a disk that takes no more, becomes one line on stderr and exit code 2.

    A `NonFiniteLossError` is one line, too, and exit code 1.
    """
    try:
        main()
    except UserError as error:
        print(f"{_error_mark()} {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteLossError as error:
        sys.exit(f"{_error_mark()} {error}")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{_error_mark()} {where}{error.strerror}, expected a file that can be read and written", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
