"""Tables of measured latency: milliseconds of each module of a detector at each width that a search may choose.

A *turn* cuts every module of the detector to one of its widths and times each step within whole forward passes. The
turns of a *round* give every module each of its widths. Rounds are repeated, so that the load of the machine affects
all widths alike, and each combines the widths of neighbouring modules, which share work, in another way. A figure is
the median over all turns and all modules of the same kind: those with the same operations on tensors of the same
shapes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.detector import Detector
from models.folding import fold_norms
from pruning.gates import clear_gates
from pruning.journal import Turn
from pruning.latency_table import Entry, LatencyTable, Setting, blocks_of
from pruning.selection import Order
from pruning.step_timing import WHOLE, attentions_of, kinds_of, steps_of, time_steps, whole_of
from pruning.transplant import cut_state_dict, slim_copy, widths_after
from util.errors import UserError

PASSES = 3  # timed in a turn
ROUNDS = (3, 12)  # least and most
SECONDS = 20.0  # to measure for, cuts and passes that are not timed included, within these rounds
END_TURNS = 7  # of the dense and the slim detector at the end


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
        of_positions: dict[tuple[str, str], list[float]] = defaultdict(list)
        rest: dict[str, list[float]] = defaultdict(list)
        for number, turn in enumerate(self.turns):
            expected = self.turn_widths(number), self._timed(turn.widths), self.graphs
            if (turn.widths, {*turn.milliseconds}, turn.graphs) != expected:
                raise UserError(
                    f"journal: found turn {number} of the latencies with other modules or widths than these"
                )
            for name, of_step in turn.milliseconds.items():
                if name in self.widths:
                    times[self.kinds[name], turn.widths[name]] += of_step
                elif users := attentions_of(name, turn.widths):
                    of_positions[self.kinds[name], blocks_of(users)] += of_step
                else:
                    rest[name] += of_step
        entries: dict[str, dict[int, Entry]] = defaultdict(dict)
        for (kind, width), of_kind in sorted(times.items(), key=lambda item: item[0][1]):
            entries[kind][width] = Entry.of(of_kind)
        ordered = {kind: entries[kind] for kind in dict.fromkeys(self.kinds[name] for name in self.widths)}
        positions: dict[str, dict[str, Entry]] = defaultdict(dict)
        for (kind, used_by), of_kind in of_positions.items():
            positions[kind][used_by] = Entry.of(of_kind)
        of_rest = {name: Entry.of(of_step) for name, of_step in rest.items()}
        return LatencyTable(self.setting, self.scope, self.graphs, self.kinds, ordered, of_rest, dict(positions))

    def _timed(self, widths: Mapping[str, int]) -> set[str]:
        """Return the names of the steps of a detector cut to these widths."""
        whole = dict.fromkeys(widths, 1)
        return {name for name in self.kinds if attentions_of(name, widths) or not attentions_of(name, whole)}


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
