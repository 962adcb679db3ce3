"""A table of measured latency, and its file.

The positions of a decoder layer's queries are timed apart, for each choice of attentions that use them. What they take
more with an attention than without it counts in the time of this attention above width 0. The rest is shared: it is
gone where both attentions are.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pruning.allocation import Shared
from pruning.step_timing import FRONT, HEADS, attentions_of
from util.environment import environment
from util.errors import UserError, reason_of, shorten

TABLE_NAME = "latency.json"


@dataclass(frozen=True)
class Setting:
    """What a latency depends on, besides the detector.

    Attributes:
        device: name of the processor or GPU.
        threads: of the CPU.
        image_size_hw: height and width of the images in pixels.
        batch_size: images in a forward pass.
        amp: precision, a key of `engine.AMP_DTYPES`.
        torch_version: of PyTorch.
    """

    device: str
    threads: int
    image_size_hw: tuple[int, int]
    batch_size: int
    amp: str
    torch_version: str

    @classmethod
    def of(cls, device: torch.device, image_size_hw: tuple[int, int], batch_size: int, amp: str) -> Setting:
        """Return the setting of this process."""
        machine = environment(device)
        return cls(machine["device"], machine["threads"], image_size_hw, batch_size, amp, machine["torch"])

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {**asdict(self), "image_size_hw": list(self.image_size_hw)}

    def __str__(self) -> str:
        height, width = self.image_size_hw
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        precision = "float32" if self.amp == "off" else self.amp
        images = f"{self.batch_size} image{'s' if self.batch_size > 1 else ''}"
        return f"{images} of {height} x {width} pixels in {precision} on {self.device}, {threads}"


@dataclass(frozen=True)
class Entry:
    """Median and interquartile range of some times in milliseconds, and their number."""

    milliseconds: float
    spread: float
    samples: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Entry:
        """Return the figures of these times."""
        quarter, _, three_quarters = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        return cls(statistics.median(times), three_quarters - quarter, len(times))


@dataclass(frozen=True)
class LatencyTable:
    """Measured latencies.

    Attributes:
        setting: what they were measured with.
        scope: one of `models.prunable.SCOPES`.
        graphs: whether CUDA graphs were replayed.
        kinds: kind of each step, see `pruning.step_timing.kinds_of`.
        entries: of each kind at each width.
        positions: of the positions of a decoder layer's queries, of each kind, by the attentions that use them.
        rest: of the steps without widths: the part before the scope's modules, what is left of modules that were
            removed before the search, and the heads.
    """

    setting: Setting
    scope: str
    graphs: bool
    kinds: Mapping[str, str]
    entries: Mapping[str, Mapping[int, Entry]]
    rest: Mapping[str, Entry]
    positions: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)

    def costs(self, widths: Mapping[str, Collection[int]], every: bool = False) -> dict[str, dict[int, float]]:
        """Return the milliseconds of each module at those of its `widths` that are worth choosing.

        These are the whole width, and each width that is faster than all larger ones, or `every` width.
        """
        costs, (of_positions, _) = {}, self._positions(widths)
        for name, of_module in widths.items():
            entries = self.entries[self.kinds[name]]
            chosen: dict[int, float] = {}
            for width in sorted(of_module, reverse=True):
                milliseconds = entries[width].milliseconds + (of_positions.get(name, 0.0) if width else 0.0)
                if every or milliseconds < min(chosen.values(), default=float("inf")):
                    chosen[width] = milliseconds
            costs[name] = dict(sorted(chosen.items()))
        return costs

    def milliseconds(self, widths: Mapping[str, int]) -> float:
        """Return the predicted milliseconds of the whole detector with these widths of all modules of the scope."""
        costs = self.costs({name: [width] for name, width in widths.items()}, every=True)
        shared = sum(shared.cost for shared in self.shared(widths) if not shared.is_gone(widths))
        rest = sum(entry.milliseconds for entry in self.rest.values())
        return rest + shared + sum(costs[name][width] for name, width in widths.items())

    def shared(self, modules: Collection[str]) -> tuple[Shared, ...]:
        """Return the milliseconds that several of the modules share; those of the other modules are gone."""
        return self._positions(modules)[1]

    def _positions(self, modules: Collection[str]) -> tuple[dict[str, float], tuple[Shared, ...]]:
        """Return the milliseconds of positions that each attention needs by itself, and what both of a layer share."""
        own, shared, whole = {}, [], dict.fromkeys(modules, 1)
        for step, kind in self.kinds.items():
            users = attentions_of(step, whole)
            if not users:
                continue
            times = {users: entry.milliseconds for users, entry in self.positions[kind].items()}
            left = with_all = times[blocks_of(users)]
            if len(users) == 1:
                own[users[0]] = with_all
                continue
            for user, other in zip(users, reversed(users), strict=True):
                without = times.get(blocks_of([other]), with_all)  # not timed if width 0 is not tried
                own[user] = min(left, max(0.0, with_all - without))
                left -= own[user]
            shared.append(Shared(left, users))
        return own, tuple(shared)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        kinds = [
            {
                "kind": kind,
                "modules": [n for n, of_step in self.kinds.items() if of_step == kind and n not in self.rest],
                "widths": {str(width): asdict(entry) for width, entry in entries.items()},
            }
            for kind, entries in self.entries.items()
        ]
        positions = [
            {
                "kind": kind,
                "steps": [name for name, of_step in self.kinds.items() if of_step == kind],
                "used_by": {users: asdict(entry) for users, entry in entries.items()},
            }
            for kind, entries in self.positions.items()
        ]
        rest = {name: {"kind": self.kinds[name], **asdict(entry)} for name, entry in self.rest.items()}
        about = {"scope": self.scope, "graphs": self.graphs, **self.setting.to_dict()}
        return {**about, "rest": rest, "positions": positions, "kinds": kinds}


def blocks_of(attentions: Iterable[str]) -> str:
    """Return the names of a layer's attentions within it."""
    return " and ".join(name.rpartition(".")[2] for name in attentions)


def read_table(path: Path, setting: Setting, scope: str) -> LatencyTable:
    """Read a table from JSON.

    Raises:
        UserError: it cannot be read, or was measured with another setting or scope.
    """
    try:
        found = json.loads(path.read_bytes())
        expected = {"scope": scope, **setting.to_dict()}
        for name, value in expected.items():
            if found[name] != value:
                raise UserError(
                    f"--latency_table {path}: found {name} {shorten(found[name], 80)}, expected {shorten(value, 80)}, "
                    "as in this run"
                )
        if "positions" not in found:
            raise UserError(
                f"--latency_table {path}: found no times of the positions of queries, as in tables of older versions, "
                "expected one of this version"
            )
        return _table(found, setting, scope)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--latency_table {path}: cannot be read ({reason_of(error)}), expected the {TABLE_NAME} of a search"
        ) from None


def _table(found: Mapping[str, Any], setting: Setting, scope: str) -> LatencyTable:
    entries: dict[str, dict[int, Entry]] = {}
    positions: dict[str, dict[str, Entry]] = {}
    kinds = {name: values["kind"] for name, values in found["rest"].items()}
    for kind, names in [(k, k["modules"]) for k in found["kinds"]] + [(k, k["steps"]) for k in found["positions"]]:
        if kind["kind"] in {*entries, *positions}:
            raise ValueError(f"found the kind {shorten(kind['kind'], 80)} twice")
        if "widths" in kind:
            entries[kind["kind"]] = {int(width): _entry(entry) for width, entry in kind["widths"].items()}
        else:
            positions[kind["kind"]] = {users: _entry(entry) for users, entry in kind["used_by"].items()}
        for name in names:
            if name in kinds:
                raise ValueError(f"found {shorten(name, 80)} twice")
            kinds[name] = kind["kind"]
    if not {FRONT, HEADS} <= {*found["rest"]}:
        raise ValueError(f"found no {FRONT} or {HEADS}")
    if not isinstance(found["graphs"], bool):
        raise ValueError(f"found graphs {shorten(found['graphs'], 80)}, expected true or false")
    rest = {name: _entry(entry) for name, entry in found["rest"].items()}
    return LatencyTable(setting, scope, found["graphs"], kinds, entries, rest, positions)


def _entry(values: Mapping[str, Any]) -> Entry:
    entry = Entry(values["milliseconds"], values["spread"], values["samples"])
    for name, is_valid in (
        ("milliseconds", _is_number(entry.milliseconds) and 0 < entry.milliseconds < float("inf")),
        ("spread", _is_number(entry.spread) and 0 <= entry.spread < float("inf")),
        ("samples", type(entry.samples) is int and entry.samples > 0),
    ):
        if not is_valid:
            raise ValueError(f"found {name} {shorten(values[name], 80)}")
    return entry


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def check_table(
    table: LatencyTable, kinds: Mapping[str, str], widths: Mapping[str, Collection[int]], source: object
) -> None:
    """Raise a `UserError` unless a table is of this detector's steps (`kinds`), with its modules at all `widths`."""
    for name in (*kinds, *table.kinds):
        users = attentions_of(name, dict.fromkeys(widths, 1))
        is_rest = name not in widths and not users
        if table.kinds.get(name) != kinds.get(name) or (name in table.rest) != is_rest:
            raise UserError(
                f"--latency_table {source}: found another {name} than that of this detector, expected a table of this "
                "detector"
            )
        if users and blocks_of(users) not in table.positions.get(kinds[name], {}):
            raise UserError(
                f"--latency_table {source}: found no time of {name} for {blocks_of(users)}, expected a table of this "
                "detector"
            )
    for name, of_module in widths.items():
        missing = sorted({*of_module} - {*table.entries[kinds[name]]})
        if missing:
            raise UserError(
                f"--latency_table {source}: found no width {missing[0]} of {name}, expected a table measured with the "
                "units of this run"
            )
