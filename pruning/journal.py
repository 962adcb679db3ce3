"""The journal of a search: one JSON line for each decision, on disk before the next one begins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from pruning.kept import Kept, from_lists, to_lists
from pruning.state_cache import PassCounter
from util.errors import UserError, one_line, reason_of, shorten
from util.files import append_json_line, move_aside, write_atomic

OUTPUT_NAME = "pruned.pth"
JOURNAL_NAME = "search.jsonl"
LARGEST = 2**53  # of a number in a journal
# Raise it when the same arguments, data and weights make a search go another way than before.
VERSION = 3
BASE_AP_TOLERANCE = 1e-3  # of mAP in [0, 1]: more than rounding on another device moves it


@dataclass(frozen=True)
class Decision:
    """What one step of a search tried and found.

    Attributes:
        visit: number of the visited module, from 0.
        module: its name.
        full_width: its channels when the visit began.
        step: number of the step within the visit, from 0.
        width: channels kept with this step.
        kept: those channels.
        target_ap: what the module is held to, in [0, 1].
        subset_ap: mAP of the subset, None where it was not needed.
        full_ap: mAP of the whole split, None where the subset's did not suffice.
        accepted: True on the last step of a visit.
        transformer_params: parameters of the transformer if every module were cut to its width so far.
        image_passes: images through any range of steps, since the search began.
        whole_passes: the same, a part of the network counting as its share.
        seconds: since the search began.
    """

    visit: int
    module: str
    full_width: int
    step: int
    width: int
    kept: Kept
    target_ap: float
    subset_ap: float | None
    full_ap: float | None
    accepted: bool
    transformer_params: int
    image_passes: int
    whole_passes: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON takes it."""
        return {**asdict(self), "kept": to_lists(self.kept)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """The decision that `to_dict` gave."""
        return cls(**{**values, "kept": from_lists(values["kept"])})


@dataclass(frozen=True)
class Trial:
    """One division of a budget, cut and measured.

    Attributes:
        keep: fraction of the transformer's cost that was asked for.
        power: exponent of the damages in the sum that was minimised.
        widths: of each module.
        full_ap: mAP in [0, 1] of the whole split.
        kept_fraction: fraction of the transformer's cost that is left.
        image_passes, whole_passes, seconds: since the search began, as in `Decision`.
    """

    keep: float
    power: float
    widths: dict[str, int]
    full_ap: float
    kept_fraction: float
    image_passes: int = field(default=0, compare=False)
    whole_passes: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """The trial that `to_dict` gave."""
        return cls(**{**values, "full_ap": float(values["full_ap"])})


class Effort:
    """What a search has cost so far, before it was interrupted and since."""

    def __init__(self, counter: PassCounter, replayed: Sequence[Decision | Trial]) -> None:
        """`replayed`: the steps made before."""
        self._counter = counter
        self._before = (
            (replayed[-1].image_passes, replayed[-1].whole_passes, replayed[-1].seconds) if replayed else (0, 0, 0)
        )
        self._began = time.monotonic()

    def so_far(self) -> dict[str, Any]:
        """`image_passes`, `whole_passes` and `seconds`."""
        images, whole, seconds = self._before
        return {
            "image_passes": images + self._counter.images,
            "whole_passes": round(whole + self._counter.whole_passes, 3),
            "seconds": round(seconds + time.monotonic() - self._began, 3),
        }


class Journal:
    """Writes `search.jsonl`; lines have the key `event`: start, decision, trial or end."""

    def __init__(self, path: str | Path) -> None:
        """Nothing is written yet; an older journal of that name is moved aside when the first line comes."""
        self.path = Path(path)
        self.begun = False

    def start(self, facts: Mapping[str, Any]) -> None:
        """What the search depends on: schedule, arguments, base mAP, widths."""
        self._write("start", facts)

    def decision(self, decision: Decision) -> None:
        """One step's outcome."""
        self._write("decision", decision.to_dict())

    def trial(self, trial: Trial) -> None:
        """One division of a budget."""
        self._write("trial", trial.to_dict())

    def end(self, facts: Mapping[str, Any]) -> None:
        """What came out."""
        self._write("end", facts)

    def resume(
        self, facts: Mapping[str, Any], ignored_args: Collection[str] = ()
    ) -> tuple[float, list[dict[str, Any]]]:
        """Continue the file that is there, if there is one; returns its base mAP and its lines behind the first.

        `ignored_args` are those that older versions wrote under `args`, and that no search reads.

        A last line that a crash cut short is dropped from it. The base mAP of another machine may differ by rounding;
        that of the journal holds.

        Raises:
            UserError: the file is none of a search that depends on the same `facts`, or that search has ended.
        """
        if not self.path.exists():
            return facts["base_ap"], []
        lines, whole_bytes = self.read()
        if not lines:
            return facts["base_ap"], []
        start, *others = lines
        wanted = json.loads(json.dumps({"event": "start", **facts}))
        base_ap = start.get("base_ap")
        if isinstance(base_ap, float) and abs(base_ap - wanted["base_ap"]) <= BASE_AP_TOLERANCE:
            wanted["base_ap"] = base_ap
        if isinstance(start.get("args"), dict):
            start = {**start, "args": {k: v for k, v in start["args"].items() if k not in ignored_args}}
        different = _differences(start, wanted)
        if different:
            name, found, expected = different[0]
            raise UserError(
                f"{self.path}: found a search with {one_line(name, 80)} {shorten(found, 80)}, expected "
                f"{shorten(expected, 80)}: --resume_search "
                "goes on with the arguments, data and weights that the search began with"
            )
        if any(line["event"] == "end" for line in others):
            raise UserError(f"{self.path}: found a search that has ended, expected one to go on with")
        if whole_bytes < self.path.stat().st_size:
            whole = self.path.read_bytes()[:whole_bytes]
            write_atomic(self.path, lambda stream: stream.write(whole))
        self.begun = True
        return wanted["base_ap"], others

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of the file, the search's start first, and how many bytes they are.

        Raises:
            UserError: the file is no journal.
        """
        try:
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            text = whole.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path}: cannot be read as a journal ({reason_of(error)}), expected lines of JSON"
            ) from None
        lines = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict) or value.get("event") not in ("start", "decision", "trial", "end"):
                raise UserError(f"{self.path}: line {number} is no event of a search, expected a journal")
            if number > 1 and value["event"] == "start":
                raise UserError(f"{self.path}: line {number} is a start, expected the first line alone to be one")
            lines.append(value)
        if lines and lines[0]["event"] != "start":
            raise UserError(f"{self.path}: line 1 is a {lines[0]['event']}, expected the start of a search")
        return lines, len(whole)

    def _write(self, event: str, facts: Mapping[str, Any]) -> None:
        if not self.begun:
            move_aside(self.path)
            self.begun = True
        append_json_line(self.path, {"event": event, **facts})


T = TypeVar("T", Decision, Trial)


def read_events(lines: Sequence[Mapping[str, Any]], event: str, kind: type[T], source: str | Path) -> list[T]:
    """The decisions or trials (`event`) among a journal's lines, as values of their `kind`.

    Raises:
        UserError: naming `source`, for a line that is none.
    """
    found = []
    for line in lines:
        if line["event"] != event:
            continue
        try:
            values = {key: value for key, value in line.items() if key != "event"}
            _check_types(values, kind)
            found.append(kind.from_dict(values))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(
                f"{source}: found a damaged {event} ({reason_of(error)}), expected those of a search"
            ) from None
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # no NaN either


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


# What JSON may hold for a field of that annotation.
TYPES: dict[str, Callable[[Any], bool]] = {
    "int": _is_whole,
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "dict[str, int]": lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
    "Kept": lambda value: (
        isinstance(value, dict)
        and all(isinstance(indices, list) and all(map(_is_whole, indices)) for indices in value.values())
    ),
}


def _check_types(values: Mapping[str, Any], kind: type[Decision] | type[Trial]) -> None:
    """Raise `ValueError` for a field whose value is not of its type, or an accepted decision without its mAP."""
    for entry in fields(kind):
        if entry.name in values and not TYPES[str(entry.type)](values[entry.name]):
            raise ValueError(f"{entry.name} {shorten(values[entry.name])}")
    if values.get("accepted") and values.get("full_ap") is None:
        raise ValueError("accepted without full_ap")


def _differences(found: Any, wanted: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted name and both values of whatever differs between two nested dicts."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        prefix = f"{name}." if name else ""
        return [d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{prefix}{key}")]
    return [] if found == wanted else [(name, found, wanted)]
