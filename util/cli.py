"""Options as fields of frozen dataclasses, parsers made from them, and types with limits."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar

import numpy as np

from util.errors import UserError, shorten

C = TypeVar("C", bound="Config")
OWN_KEYWORDS = ("stored", "short", "positional", "read")  # of `option`, not of `add_argument`


def option(default: Any, help: str, *, stored: str = "training", **keywords: Any) -> Any:
    """Define an option as a field of a `Config`; a default of True or False makes it a flag.

    Args:
        stored: when a checkpoint's value replaces the default. `network`: always, and a typed value must agree with it;
        `preferred`: always; `training`: if its training continues; `run`: never.
        keywords: `short`, a second name such as `-m`; `positional`, to be given without a name; `read`, a function that
        converts a given value; and keywords of `add_argument`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "stored": stored, **keywords})


def group(config_class: type[C], title: str | None) -> Any:
    """Define a field of a `Config` that is another config, with options under `title` or, if None, without options."""
    return dataclasses.field(default_factory=config_class, metadata={"config": config_class, "title": title})


@dataclasses.dataclass(frozen=True)
class Config:
    """One or several groups of options; values from command lines and files are checked."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for the first invalid value."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "read" in field.metadata:
                object.__setattr__(self, field.name, None if value is None else field.metadata["read"](value))
            elif "help" in field.metadata and (expected := _expected(field.metadata, field.default, value)):
                raise UserError(f"found {shorten(value)} under `args.{field.name}`, expected {expected}")

    @classmethod
    def from_values(cls: type[C], values: Mapping[str, Any], source: object = None) -> C:
        """Return a config with the values it has fields for; `source` is the file they come from.

        Raises:
            UserError: a value is wrong; names `source` and the field.
        """
        found = {}
        for field in dataclasses.fields(cls):
            if "config" in field.metadata:
                found[field.name] = field.metadata["config"].from_values(values, source)
            elif field.name in values:
                found[field.name] = values[field.name]
        try:
            return cls(**found)
        except UserError as error:
            raise error if source is None else UserError(f"{source}: {error}") from None

    def values(self) -> dict[str, Any]:
        """Return all values by name, including those of groups."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found |= value.values() if "config" in field.metadata else {field.name: value}
        return found

    def with_values(self: C, values: Mapping[str, Any], source: object = None) -> C:
        """Return a copy with other values, see `from_values`."""
        return self.from_values({**self.values(), **values}, source)


def options_of(*config_classes: type[Config]) -> dict[str, dataclasses.Field]:
    """Return the options of configs and their groups by name."""
    found: dict[str, dataclasses.Field] = {}
    for field in (field for config_class in config_classes for field in dataclasses.fields(config_class)):
        if "config" in field.metadata:
            found |= options_of(field.metadata["config"])
        elif "help" in field.metadata:
            found[field.name] = field
    return found


def add_options(parser: argparse._ActionsContainer, config_class: type[Config], **changed_defaults: Any) -> None:
    """Add a config's options to a parser or to one of its groups."""
    for name, field in options_of(config_class).items():
        keywords = {key: value for key, value in field.metadata.items() if key not in OWN_KEYWORDS}
        if isinstance(field.default, bool):
            keywords["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        names = [field.metadata["short"]] if "short" in field.metadata else []
        names.append(name if field.metadata.get("positional") else f"--{name}")
        parser.add_argument(*names, default=changed_defaults.get(name, field.default), **keywords)


def add_groups(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Add the options of a config's groups to a parser under the groups' titles; groups may share one."""
    parts: dict[str, argparse._ActionsContainer] = {}
    for about in (field.metadata for field in dataclasses.fields(config_class)):
        title = about["title"]
        if title is not None:
            parts[title] = parts.get(title) or parser.add_argument_group(title)
            add_options(parts[title], about["config"])


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Parse `argv`; return the options and the names of the typed ones, whatever their value.

    Raises:
        UserError: argparse rejects `argv`; its message without the usage.
    """
    names = set()

    class Typed(argparse.Namespace):
        """Has every option as None, so that argparse only sets the typed ones."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)
            names.add(name)

    def refuse_line(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser.error = refuse_line  # type: ignore[method-assign]
    typed = vars(parser.parse_args(argv, Typed()))
    values = {name: parser.get_default(name) for name in names} | typed
    values = {name: value for name, value in values.items() if value is not argparse.SUPPRESS}  # --help is no value
    return argparse.Namespace(**values), set(typed)


def options_from_python(given: Mapping[str, Any], *config_classes: type[Config]) -> tuple[argparse.Namespace, set[str]]:
    """Return keyword arguments as if they had been typed, for calls of a script from Python; see `parse`.

    Args:
        given: option names without `--`, and values; a `Path` may stand for a file, also in a list. A leading `~` is
        the home folder where it is one on the command line.
        config_classes: options of the script.

    Raises:
        UserError: there is no such option.
    """
    known = options_of(*config_classes)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", such as {close[0]}" if close else ""
            raise UserError(f"{shorten(name)}: found no such option, expected one of the command line{hint}")
    values = {
        name: _plain(value, is_path=known[name].metadata.get("type") is os.path.expanduser)
        for name, value in given.items()
    }
    return argparse.Namespace(**values), set(values)


def _plain(value: Any, *, is_path: bool) -> Any:
    """Return a value as the command line gives it: text for a path, Python's number for numpy's."""
    if isinstance(value, list | tuple):
        return [_plain(entry, is_path=is_path) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    value = str(value) if isinstance(value, PurePath) else value
    return os.path.expanduser(value) if is_path and isinstance(value, str) else value


def refuse(names: Iterable[str], typed: Collection[str], reason: str) -> None:
    """Raise a `UserError` for typed options among `names`, which a run would not use."""
    found = [f"--{name}" for name in names if name in typed]
    if found:
        raise UserError(f"{', '.join(found)}: {reason}")


def _expected(about: Mapping[str, Any], default: Any, value: Any) -> str | None:
    """Return None if `value` is valid for an option with the metadata `about`, else a text of what is."""
    if value is None and default is None:
        return None
    nargs = about.get("nargs")
    if about.get("action") == "append":
        return _expected_list({**about, "action": None}, None, value)
    if nargs not in (None, "?"):
        return _expected_list({**about, "nargs": None}, nargs, value)
    if "choices" in about:
        return None if value in about["choices"] else f"one of {', '.join(map(str, about['choices']))}"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    kind = about.get("type", str)
    if kind in (str, os.path.expanduser):
        return None if isinstance(value, str) else "text"
    try:
        return None if kind(str(value)) == value else f"a {kind.__name__}"
    except argparse.ArgumentTypeError as error:
        return str(error).partition("expected ")[2]
    except ValueError:
        return f"a {kind.__name__}"


def _expected_list(about: Mapping[str, Any], length: object, value: Any) -> str | None:
    """Return None if `value` is a list of valid entries, and of `length` if that is a number; else what is expected."""
    is_list = isinstance(value, list | tuple)
    faults = [_expected(about, ..., entry) for entry in (value if is_list else [None])]
    if is_list and not any(faults) and (not isinstance(length, int) or len(value) == length):
        return None
    count = f" of {length}" if isinstance(length, int) else ""
    return f"a list{count}, each {next(filter(None, faults), 'valid')}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Short names of values, defaults if there are any, and examples verbatim."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 34, **options})

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        short = {"whole number": "N", "int": "N", "number": "X", "float": "X", "Path": "PATH"}
        name = getattr(action.type, "__name__", "")
        return short.get(name, super()._get_default_metavar_for_optional(action))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Omit the usual defaults, flags that are off and None; help texts describe what happens then.
        nothing_to_tell = action.default is None or action.default is False
        return action.help if nothing_to_tell else super()._get_help_string(action)


def script_parser(doc: str, words: str = "[options]", **options: Any) -> argparse.ArgumentParser:
    """Return a script's parser: the docstring's first line is the description, its command lines the examples.

    Args:
        doc: the docstring.
        words: what follows the script's name in the usage; the many options are only listed below it.
        options: arguments of `argparse.ArgumentParser`.
    """
    title, *lines = doc.strip().splitlines() or [""]
    examples = [f"  {line.strip()}" for line in lines if line.split(maxsplit=1)[:1] in (["python"], ["torchrun"])]
    epilog = "\n".join(["examples:", *examples]) if examples else None
    return argparse.ArgumentParser(
        usage=f"%(prog)s {words}", description=title, epilog=epilog, formatter_class=HelpFormatter, allow_abbrev=False,
        **options,
    )  # fmt: skip


def user_path(text: str) -> Path:
    """Option type: a path, in which a leading `~` is the home folder (shells do not expand it in `--name=~/x`)."""
    return Path(os.path.expanduser(text))


def whole(minimum: int, *, at_most: int | None = None) -> Callable[[str], int]:
    """Return an option type: a whole number from `minimum` up, or to `at_most`."""

    def read(text: str) -> int:
        value = int(text)
        if value < minimum or (at_most is not None and value > at_most):
            limits = "up" if at_most is None else f"to {at_most}"
            raise argparse.ArgumentTypeError(f"{text:.40}: expected a whole number from {minimum} {limits}")
        return value

    read.__name__ = "whole number"  # for argparse's error
    return read


def real(minimum: float, below: float = float("inf"), *, at_most: float = float("inf")) -> Callable[[str], float]:
    """Return an option type: a number in [minimum, below) and not above `at_most`."""

    def read(text: str) -> float:
        value = float(text)
        if not minimum <= value < below or value > at_most:
            limits = f"[{minimum:g}, {at_most:g}]" if at_most < below else f"[{minimum:g}, {below:g})"
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {limits}")
        return value

    read.__name__ = "number"
    return read
