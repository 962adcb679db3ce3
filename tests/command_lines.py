"""Reads the command lines in pages, and parses each with the parser of the script that it starts."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.run import get_args_parser as get_torchrun_parser

ROOT = Path(__file__).resolve().parent.parent
STARTS = ("python ", "torchrun ", "make ", "pip ", "cd ")
CODE_BLOCK = re.compile(r"^```\w*\n(?P<fenced>[\s\S]*?)^```|^ {4}.*\n(?:(?: {4}.*)?\n)*", re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`]+)`")


class Parsed(BaseException):
    """Raised in place of returning from `parse_args`, so that the script stops there; holds parser and options."""

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        super().__init__()
        self.parser, self.options = parser, options


def without_code(text: str) -> str:
    """A page's prose: no code blocks, no code spans."""
    return CODE_SPAN.sub("", CODE_BLOCK.sub("\n", text))


def code_spans(text: str) -> list[str]:
    """The code spans of a page's prose."""
    return [" ".join(span.split()) for span in CODE_SPAN.findall(CODE_BLOCK.sub("\n", text))]


def commands_in(text: str) -> Iterator[tuple[Path, list[str]]]:
    """Folder and words of each command in a page's code blocks and code spans; a torchrun without a script is none."""
    blocks = (match["fenced"] or match[0] for match in CODE_BLOCK.finditer(text))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *code_spans(text)]:
        if not line.startswith(STARTS):
            continue
        folder = ROOT
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words[0] == "cd":
                folder = ROOT / words[1]
            elif words[0] != "torchrun" or any(word.endswith(".py") for word in words):
                yield folder, words


def parse_as_started(words: Sequence[str]) -> Parsed:
    """Start `python WORDS` in this process up to the point where its command line is parsed.

    Raises:
        SystemExit: the script refuses the command line.
        LookupError: the script parses none.
    """
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None) -> None:
        raise Parsed(parser, parse_args(parser, args, namespace))

    script, options = (words[1], words[2:]) if words[0] == "-m" else (str(ROOT / words[0]), words[1:])
    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
            mock.patch("sys.argv", [script, *options]),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
            if words[0] == "-m":
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
    except Parsed as parsed:
        return parsed
    finally:
        torch.set_flush_denormal(False)  # scripts set it before they parse
    raise LookupError(f"{script} parses no command line")


def parse_torchrun(words: Sequence[str]) -> tuple[str, Parsed]:
    """The script that `torchrun WORDS` starts, and what it parses."""
    started = get_torchrun_parser().parse_args(list(words))
    return started.training_script, parse_as_started([started.training_script, *started.training_script_args])
