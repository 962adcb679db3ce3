"""Parsers of command lines: how --help looks, and types of options with their limits."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A short usage, short names for values, defaults where there are some, and examples as they are written."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 34, **options})

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        """Name what has to be given; the other options stand below, and are many."""
        if usage is None:
            words = []
            for action in actions:
                if not action.option_strings:
                    words.append(self._format_args(action, self._get_default_metavar_for_positional(action)))
                elif action.required:
                    value = self._format_args(action, self._get_default_metavar_for_optional(action))
                    words.append(f"{action.option_strings[0]} {value}")
            usage = " ".join(["%(prog)s", *words, "[options]"])
        super().add_usage(usage, actions, groups, prefix)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        short = {"whole number": "N", "int": "N", "number": "X", "float": "X", "Path": "PATH"}
        name = getattr(action.type, "__name__", "")
        return short.get(name, super()._get_default_metavar_for_optional(action))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # That a flag is off, or a value not given, is what people expect; a text says what happens then.
        nothing_to_tell = action.default is None or action.default is False
        return action.help if nothing_to_tell else super()._get_help_string(action)


def script_parser(doc: str, **options: Any) -> argparse.ArgumentParser:
    """The parser of a script: the first line of its docstring describes it, the command lines in it are examples.

    Args:
        doc: the docstring.
        options: of `argparse.ArgumentParser`.
    """
    title, *lines = doc.strip().splitlines() or [""]
    examples = [f"  {line.strip()}" for line in lines if line.split(maxsplit=1)[:1] in (["python"], ["torchrun"])]
    epilog = "\n".join(["examples:", *examples]) if examples else None
    return argparse.ArgumentParser(
        description=title, epilog=epilog, formatter_class=HelpFormatter, allow_abbrev=False, **options
    )


def user_path(text: str) -> Path:
    """Type of an option: a file or folder, where a leading `~` is the home folder (shells leave it in `--name=~/x`)."""
    return Path(os.path.expanduser(text))


def whole(minimum: int, *, at_most: int | None = None) -> Callable[[str], int]:
    """Type of an option: a whole number from `minimum` up, or to `at_most`."""

    def read(text: str) -> int:
        value = int(text)
        if value < minimum or (at_most is not None and value > at_most):
            limits = "up" if at_most is None else f"to {at_most}"
            raise argparse.ArgumentTypeError(f"{text:.40}: expected a whole number from {minimum} {limits}")
        return value

    read.__name__ = "whole number"  # argparse shows it in its error
    return read


def real(minimum: float, below: float = float("inf"), *, at_most: float = float("inf")) -> Callable[[str], float]:
    """Type of an option: a number in [minimum, below) and not above `at_most`."""

    def read(text: str) -> float:
        value = float(text)
        if not minimum <= value < below or value > at_most:
            limits = f"[{minimum:g}, {at_most:g}]" if at_most < below else f"[{minimum:g}, {below:g})"
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {limits}")
        return value

    read.__name__ = "number"
    return read
