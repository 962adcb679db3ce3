"""Errors that are the user's to mend, and how an entry script reports them."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names file, key or option, what was found and expected."""


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry script; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
