"""Tables of measured latency: milliseconds of each module of a detector at each width that a search may choose.

A *turn* cuts every module of the detector to one of its widths and times each step within whole forward passes. The
turns of a *round* give every module each of its widths. Rounds are repeated, so that the load of the machine affects
all widths alike, and each combines the widths of neighbouring modules, which share work, in another way. A figure is
the median over all turns and all modules of the same kind: those with the same operations on tensors of the same
shapes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.detector import Detector
from models.folding import fold_norms
from pruning.gates import clear_gates
from pruning.journal import Turn
from pruning.selection import Order
from pruning.step_timing import FRONT, HEADS, WHOLE, kinds_of, steps_of, time_steps, whole_of
from pruning.transplant import cut_state_dict, slim_copy, widths_after
from util.environment import environment
from util.errors import UserError, reason_of, shorten

TABLE_NAME = "latency.json"
PASSES = 3  # timed in a turn
ROUNDS = (3, 12)  # least and most
SECONDS = 20.0  # to measure for, cuts and passes that are not timed included, within these rounds
END_TURNS = 7  # of the dense and the slim detector at the end


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
        rest: of the steps without widths: the part before the scope's modules, what is left of modules that were
            removed before the search, and the heads.
    """

    setting: Setting
    scope: str
    graphs: bool
    kinds: Mapping[str, str]
    entries: Mapping[str, Mapping[int, Entry]]
    rest: Mapping[str, Entry]

    def costs(self, widths: Mapping[str, Collection[int]], every: bool = False) -> dict[str, dict[int, float]]:
        """Return the milliseconds of each module at those of its `widths` that are worth choosing.

        These are the whole width, and each width that is faster than all larger ones, or `every` width.
        """
        costs = {}
        for name, of_module in widths.items():
            entries = self.entries[self.kinds[name]]
            chosen: dict[int, float] = {}
            for width in sorted(of_module, reverse=True):
                milliseconds = entries[width].milliseconds
                if every or milliseconds < min(chosen.values(), default=float("inf")):
                    chosen[width] = milliseconds
            costs[name] = dict(sorted(chosen.items()))
        return costs

    def milliseconds(self, widths: Mapping[str, int]) -> float:
        """Return the predicted milliseconds of the whole detector with these widths of all modules of the scope."""
        rest = sum(entry.milliseconds for entry in self.rest.values())
        return rest + sum(self.entries[self.kinds[name]][width].milliseconds for name, width in widths.items())

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
        rest = {name: {"kind": self.kinds[name], **asdict(entry)} for name, entry in self.rest.items()}
        about = {"scope": self.scope, "graphs": self.graphs, **self.setting.to_dict()}
        return {**about, "rest": rest, "kinds": kinds}


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
        return _table(found, setting, scope)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--latency_table {path}: cannot be read ({reason_of(error)}), expected the {TABLE_NAME} of a search"
        ) from None


def _table(found: Mapping[str, Any], setting: Setting, scope: str) -> LatencyTable:
    entries: dict[str, dict[int, Entry]] = {}
    kinds = {name: values["kind"] for name, values in found["rest"].items()}
    for kind in found["kinds"]:
        if kind["kind"] in entries:
            raise ValueError(f"found the kind {shorten(kind['kind'], 80)} twice")
        entries[kind["kind"]] = {int(width): _entry(entry) for width, entry in kind["widths"].items()}
        for name in kind["modules"]:
            if name in kinds:
                raise ValueError(f"found {shorten(name, 80)} twice")
            kinds[name] = kind["kind"]
    if not {FRONT, HEADS} <= {*found["rest"]}:
        raise ValueError(f"found no {FRONT} or {HEADS}")
    if not isinstance(found["graphs"], bool):
        raise ValueError(f"found graphs {shorten(found['graphs'], 80)}, expected true or false")
    rest = {name: _entry(entry) for name, entry in found["rest"].items()}
    return LatencyTable(setting, scope, found["graphs"], kinds, entries, rest)


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
        if table.kinds.get(name) != kinds.get(name) or (name in table.rest) == (name in widths):
            raise UserError(
                f"--latency_table {source}: found another {name} than that of this detector, expected a table of this "
                "detector"
            )
    for name, of_module in widths.items():
        missing = sorted({*of_module} - {*table.entries[kinds[name]]})
        if missing:
            raise UserError(
                f"--latency_table {source}: found no width {missing[0]} of {name}, expected a table measured with the "
                "units of this run"
            )


class Measurement:
    """Measures a table, turn by turn; turns measured before are not repeated."""

    def __init__(
        self,
        model: Detector,
        scope: str,
        setting: Setting,
        widths: Mapping[str, Sequence[int]],
        device: torch.device,
        turns: Sequence[Turn] = (),
        graphs: bool = False,
    ) -> None:
        """Record the operations of each module.

        Args:
            model: the unpruned detector.
            widths: of each module of the scope, ascending and up to its whole width.
            turns: those measured so far.
            graphs: whether to replay CUDA graphs.
        """
        self.scope, self.setting, self.widths, self.device, self.graphs = scope, setting, widths, device, graphs
        self.turns = list(turns)
        self._model = model
        self._images = random_images(setting, device)
        whole = unpruned_copy(model, scope)
        self.kinds = kinds_of(steps_of(whole, self._images, scope), device, setting.amp)

    @property
    def turns_in_round(self) -> int:
        """Turns that give every module each of its widths."""
        return max(map(len, self.widths.values()))

    @property
    def num_turns(self) -> int:
        """Turns in all; the least number before the time of the first one is known."""
        in_round = self.turns_in_round
        if len(self.turns) < in_round:
            return ROUNDS[0] * in_round
        first = sum(turn.seconds for turn in self.turns[:in_round])
        return in_round * (ROUNDS[1] if first * ROUNDS[1] < SECONDS else max(int(SECONDS / first), ROUNDS[0]))

    def turn_widths(self, turn: int) -> dict[str, int]:
        """Return the widths of all modules in a turn.

        The shift between neighbours grows from round to round, so that those with three or more widths seldom go in
        step.
        """
        shift = 1 + turn // self.turns_in_round
        placed = enumerate(self.widths.items())
        return {name: widths[(turn + shift * place) % len(widths)] for place, (name, widths) in placed}

    def add(self, turn: Turn) -> None:
        """Add a measured turn."""
        self.turns.append(turn)

    def measure(self) -> Turn:
        """Measure the next turn and return it."""
        began, widths = time.monotonic(), self.turn_widths(len(self.turns))
        slim = cut_copy(self._model, self.scope, widths)
        steps = steps_of(slim, self._images, self.scope)
        times = time_steps(steps, self.device, self.setting.amp, repeats=PASSES, graphs=self.graphs)
        milliseconds = {name: [round(t, 6) for t in of_step] for name, of_step in times.items()}
        return Turn(self.graphs, widths, milliseconds, round(time.monotonic() - began, 3))

    def table(self) -> LatencyTable:
        """Return the table of all turns.

        Raises:
            UserError: a turn has other modules or widths than this search.
        """
        times: dict[tuple[str, int], list[float]] = defaultdict(list)
        rest: dict[str, list[float]] = defaultdict(list)
        for number, turn in enumerate(self.turns):
            if turn.widths != self.turn_widths(number) or {*turn.milliseconds} != {*self.kinds}:
                raise UserError(
                    f"journal: found turn {number} of the latencies with other modules or widths than these"
                )
            for name, of_step in turn.milliseconds.items():
                if name in self.widths:
                    times[self.kinds[name], turn.widths[name]] += of_step
                else:
                    rest[name] += of_step
        entries: dict[str, dict[int, Entry]] = defaultdict(dict)
        for (kind, width), of_kind in sorted(times.items(), key=lambda item: item[0][1]):
            entries[kind][width] = Entry.of(of_kind)
        ordered = {kind: entries[kind] for kind in dict.fromkeys(self.kinds[name] for name in self.widths)}
        of_rest = {name: Entry.of(of_step) for name, of_step in rest.items()}
        return LatencyTable(self.setting, self.scope, self.graphs, self.kinds, ordered, of_rest)


def measure_whole(
    models: Mapping[str, Callable[[], Detector]],
    setting: Setting,
    device: torch.device,
    *,
    graphs: bool,
    on_turn: Callable[[], Any] = lambda: None,
) -> dict[str, Entry]:
    """Time whole forward passes of several detectors in turns.

    `models` build them. A detector is built anew for each of its turns, so that only one takes memory.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    images = random_images(setting, device)
    for _ in range(END_TURNS):
        for name, build in models.items():
            found = time_steps(whole_of(build(), images), device, setting.amp, repeats=PASSES, graphs=graphs)
            times[name] += found[WHOLE]
        on_turn()
    return {name: Entry.of(of_model) for name, of_model in times.items()}


def random_images(setting: Setting, device: torch.device) -> list[Tensor]:
    """Return images of noise of the setting's size and number."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(setting.batch_size, 3, *setting.image_size_hw, generator=generator)
    return list(batch.to(device))


def unpruned_copy(model: Detector, scope: str) -> Detector:
    """Return a copy of a detector without gates; see `cut_copy`."""
    return cut_copy(model, scope, {name: module.width for name, module in model.prunable_modules(scope).items()})


def cut_copy(model: Detector, scope: str, widths: Mapping[str, int]) -> Detector:
    """Return a copy of a detector whose modules have only their first channels, to be timed.

    Its batch norms are folded, as for inference.
    """
    modules = model.prunable_modules(scope)
    kept = {name: Order.natural(modules[name]).kept(width) for name, width in widths.items()}
    state = cut_state_dict(model.state_dict(), kept, modules)
    slim = slim_copy(model, state, widths_after(model.widths_in(scope), kept))
    clear_gates(slim)
    fold_norms(slim)
    return slim
