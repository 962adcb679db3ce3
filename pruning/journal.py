"""The journal of a search: one JSON line for each decision, on disk before the next decision begins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from models.widths import Widths
from pruning.kept_channels import Kept, from_lists, to_lists
from pruning.state_cache import PassCounter
from util.errors import UserError, one_line, reason_of, shorten
from util.files import append_json_line, move_aside, write_atomic

OUTPUT_NAME = "pruned.pth"
JOURNAL_NAME = "search.jsonl"
LARGEST = 2**53  # bound of the numbers in a journal
# Increase it when a search decides differently than before with the same arguments, data and weights.
VERSION = 6
EVENTS = ("start", "latency", "layers", "decision", "trial", "end")
BASE_AP_TOLERANCE = 1e-3  # of mAP in [0, 1]; more than rounding differs between devices


@dataclass(frozen=True)
class Decision:
    """One step of a search and its result.

    Attributes:
        visit: index of the visit, from 0.
        module: name of the visited module.
        full_width: its channels when the visit began.
        step: index of the step within the visit, from 0.
        width: number of kept channels.
        kept: the kept channels.
        target_ap: target mAP of the module, in [0, 1].
        subset_ap: mAP of the subset, None if not needed.
        full_ap: mAP of the whole split, None if the subset's mAP was too low.
        accepted: True on the last step of a visit.
        transformer_params: parameters of the transformer with every module at its current width.
        image_passes: images through any range of steps since the search began.
        whole_passes: the same, where a part of the network counts as its share of the cost.
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
        """Convert to JSON values."""
        return {**asdict(self), "kept": to_lists(self.kept)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Convert the values of `to_dict` back."""
        return cls(**{**values, "kept": from_lists(values["kept"])})


@dataclass(frozen=True)
class Trial:
    """One allocation of a budget, cut and measured.

    Attributes:
        keep: requested fraction of the transformer's cost.
        power: exponent of the damages in the minimised sum.
        widths: of each module.
        full_ap: mAP in [0, 1] of the whole split.
        kept_fraction: remaining fraction of the transformer's cost.
        keep_params: requested fraction of the parameters, None without --keep_params.
        kept_params: remaining fraction of the parameters, None without --keep_params.
        decoder_layers: number of decoder layers that are left; None if the search drops none.
        image_passes, whole_passes, seconds: since the search began, as in `Decision`.
    """

    keep: float
    power: float
    widths: dict[str, int]
    full_ap: float
    kept_fraction: float
    keep_params: float | None = None
    kept_params: float | None = None
    decoder_layers: int | None = None
    image_passes: int = field(default=0, compare=False)
    whole_passes: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """Convert the values of `to_dict` back."""
        return cls(**{**values, "full_ap": float(values["full_ap"])})

    @property
    def name(self) -> list[Any]:
        """Fraction, power and decoder layers, which no two trials of a search share; their widths may be the same."""
        return [self.keep, self.power, self.decoder_layers]

    def widths_after(self, before: Widths) -> Widths:
        """Return the widths of the whole detector, which had the widths `before`."""
        after = before if self.decoder_layers is None else before.first_layers(self.decoder_layers)
        for name, width in self.widths.items():
            after = after.replace(name, width)
        return after


@dataclass(frozen=True)
class Layers:
    """mAP in [0, 1] of the whole split after each decoder layer of the detector before the search."""

    ap_by_layer: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layers:
        """Convert the values of `to_dict` back."""
        return cls(**values)


@dataclass(frozen=True)
class Turn:
    """Latencies of one cut of the detector, see `pruning.latency`.

    Attributes:
        graphs: whether CUDA graphs were replayed.
        widths: of each module.
        milliseconds: of each step in each pass.
        seconds: that the turn took, passes that are not timed included.
    """

    graphs: bool
    widths: dict[str, int]
    milliseconds: dict[str, list[float]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Turn:
        """Convert the values of `to_dict` back."""
        return cls(**values)


class Effort:
    """Cost of a search so far, including the time before it was resumed."""

    def __init__(self, counter: PassCounter, replayed: Sequence[Decision | Trial]) -> None:
        """`replayed`: the steps before the search was resumed."""
        self._counter = counter
        self._before = (
            (replayed[-1].image_passes, replayed[-1].whole_passes, replayed[-1].seconds) if replayed else (0, 0, 0)
        )
        self._began = time.monotonic()

    def so_far(self) -> dict[str, Any]:
        """Return `image_passes`, `whole_passes` and `seconds`."""
        images, whole, seconds = self._before
        return {
            "image_passes": images + self._counter.images,
            "whole_passes": round(whole + self._counter.whole_passes, 3),
            "seconds": round(seconds + time.monotonic() - self._began, 3),
        }


class Journal:
    """Writes `search.jsonl`; the key `event` of a line is one of `EVENTS`."""

    def __init__(self, path: str | Path) -> None:
        """Write nothing yet; the first line moves an existing journal aside."""
        self.path = Path(path)
        self.begun = False

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write what the search depends on: schedule, arguments, base mAP, widths."""
        self._write("start", facts)

    def decision(self, decision: Decision) -> None:
        """Write a decision."""
        self._write("decision", decision.to_dict())

    def trial(self, trial: Trial) -> None:
        """Write a trial."""
        self._write("trial", trial.to_dict())

    def turn(self, turn: Turn) -> None:
        """Write a turn of the latency measurement."""
        self._write("latency", turn.to_dict())

    def layers(self, layers: Layers) -> None:
        """Write mAP after each decoder layer."""
        self._write("layers", layers.to_dict())

    def end(self, facts: Mapping[str, Any]) -> None:
        """Write the result of the search."""
        self._write("end", facts)

    def resume(
        self,
        facts: Mapping[str, Any],
        ignored_args: Collection[str] = (),
        added: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> tuple[float, list[dict[str, Any]]]:
        """Continue an existing journal; return its base mAP and its lines after the first.

        An incomplete last line, left by a crash, is removed. The base mAP may differ by rounding on another machine;
        that of the journal counts. Without a journal, return the base mAP of `facts` and no lines.

        Args:
            facts: what the search depends on.
            ignored_args: options that older versions wrote under `args` and that no search reads.
            added: facts that older versions did not write, with the values that they had.

        Raises:
            UserError: the file is not a journal, its search depends on other `facts`, or it has ended.
        """
        base_ap, others, whole_bytes = self.check(facts, ignored_args, added)
        if whole_bytes:
            if whole_bytes < self.path.stat().st_size:
                whole = self.path.read_bytes()[:whole_bytes]
                write_atomic(self.path, lambda stream: stream.write(whole))
            self.begun = True
        return base_ap, others

    def check(
        self,
        facts: Mapping[str, Any],
        ignored_args: Collection[str] = (),
        added: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> tuple[float, list[dict[str, Any]], int]:
        """Read an existing journal as `resume` does, but write nothing; also return the size of its whole lines."""
        if not self.path.exists():
            return facts["base_ap"], [], 0
        lines, whole_bytes = self.read()
        if not lines:
            return facts["base_ap"], [], 0
        start, *others = lines
        wanted = json.loads(json.dumps({"event": "start", **facts}))
        base_ap = start.get("base_ap")
        if isinstance(base_ap, float) and abs(base_ap - wanted["base_ap"]) <= BASE_AP_TOLERANCE:
            wanted["base_ap"] = base_ap
        if isinstance(start.get("args"), dict):
            start = {**start, "args": {k: v for k, v in start["args"].items() if k not in ignored_args}}
        for name, values in added.items():
            if isinstance(start.get(name), dict):
                start = {**start, name: {**values, **start[name]}}
        different = _differences(start, wanted)
        if different:
            name, found, expected = different[0]
            raise UserError(
                f"{self.path}: found a search with {one_line(name, 80)} {shorten(found, 80)}, expected "
                f"{shorten(expected, 80)}: --resume_search needs the original arguments, data and weights"
            )
        if any(line["event"] == "end" for line in others):
            raise UserError(f"{self.path}: found a search that has ended, expected an unfinished one")
        return wanted["base_ap"], others, whole_bytes

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """Read the complete lines of the file, beginning with the start, and return them with their size in bytes.

        Raises:
            UserError: the file is not a journal.
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
            if not isinstance(value, dict) or value.get("event") not in EVENTS:
                raise UserError(f"{self.path}: line {number} is not an event of a search, expected a journal")
            if number > 1 and value["event"] == "start":
                raise UserError(f"{self.path}: line {number} is a start, expected a start on line 1 only")
            lines.append(value)
        if lines and lines[0]["event"] != "start":
            raise UserError(f"{self.path}: line 1 is a {lines[0]['event']}, expected the start of a search")
        return lines, len(whole)

    def _write(self, event: str, facts: Mapping[str, Any]) -> None:
        if not self.begun:
            move_aside(self.path)
            self.begun = True
        append_json_line(self.path, {"event": event, **facts})


T = TypeVar("T", Decision, Trial, Turn, Layers)


def read_events(lines: Sequence[Mapping[str, Any]], event: str, kind: type[T], source: str | Path) -> list[T]:
    """Return the decisions, trials, latencies or layers (`event`) of a journal's lines as objects of `kind`.

    Raises:
        UserError: one is damaged; the message names `source`.
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
                f"{source}: found a damaged {event} ({reason_of(error)}), expected a journal of a search"
            ) from None
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # excludes NaN


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_time(value: Any) -> bool:
    return _is_number(value) and value >= 0


# Check of a JSON value by the annotation of its field.
TYPES: dict[str, Callable[[Any], bool]] = {
    "int": _is_whole,
    "int | None": lambda value: value is None or _is_whole(value),
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "dict[str, int]": lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
    "list[float]": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "dict[str, list[float]]": lambda value: (
        isinstance(value, dict)
        and all(isinstance(times, list) and times and all(map(_is_time, times)) for times in value.values())
    ),
    "Kept": lambda value: (
        isinstance(value, dict)
        and all(isinstance(indices, list) and all(map(_is_whole, indices)) for indices in value.values())
    ),
}


def _check_types(values: Mapping[str, Any], kind: type[Decision | Trial | Turn | Layers]) -> None:
    """Raise `ValueError` for a value of a wrong type, or an accepted decision without mAP."""
    for entry in fields(kind):
        if entry.name in values and not TYPES[str(entry.type)](values[entry.name]):
            raise ValueError(f"{entry.name} {shorten(values[entry.name])}")
    if values.get("accepted") and values.get("full_ap") is None:
        raise ValueError("accepted without full_ap")


def _differences(found: Any, wanted: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return dotted name and both values of each difference between two nested dicts."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        prefix = f"{name}." if name else ""
        return [d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{prefix}{key}")]
    return [] if found == wanted else [(name, found, wanted)]
