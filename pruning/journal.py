"""The journal of a search: one JSON line for each decision, on disk before the next one begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pruning.kept import Kept, to_lists
from util.files import append_json_line, move_aside


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
        transformer_params: parameters of the transformer if every module were cut as it stands.
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


class Journal:
    """Writes `search.jsonl`; lines have the key `event`: start, decision or end."""

    def __init__(self, path: str | Path) -> None:
        """Nothing is written yet; an older journal of that name is moved aside when the first line comes."""
        self.path = Path(path)
        self._begun = False

    def start(self, facts: Mapping[str, Any]) -> None:
        """What the search depends on: schedule, arguments, base mAP, widths."""
        self._write("start", facts)

    def decision(self, decision: Decision) -> None:
        """One step's outcome."""
        self._write("decision", decision.to_dict())

    def end(self, facts: Mapping[str, Any]) -> None:
        """What came out."""
        self._write("end", facts)

    def _write(self, event: str, facts: Mapping[str, Any]) -> None:
        if not self._begun:
            move_aside(self.path)
            self._begun = True
        append_json_line(self.path, {"event": event, **facts})
