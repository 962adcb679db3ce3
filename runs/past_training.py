"""Learning rates of the training that a detector comes from, for fine-tuning after a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTED = ("past_lr", "past_lr_backbone", "past_batch")  # names in the `args` of a search's output


@dataclass(frozen=True)
class PastTraining:
    """Learning rates of a detector's training.

    Attributes:
        lr: learning rate.
        lr_backbone: that of the backbone; None if it is not known or 0.
        batch: images of an optimizer step; None if it is not known.
    """

    lr: float
    lr_backbone: float | None
    batch: int | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> PastTraining | None:
        """Return the training in a checkpoint's `args`, of a training or of a search, or None if there is none."""
        if NOTED[0] in arguments:
            lr, lr_backbone, batch = (arguments.get(name) for name in NOTED)
        else:
            lr, lr_backbone = arguments.get("lr"), arguments.get("lr_backbone")
            factors: list[Any] = [arguments.get(name) for name in ("batch_size", "accumulate", "processes")]
            batch = math.prod(factors) if all(map(_is_count, factors)) else None
        known_lr = _rate(lr)
        return None if known_lr is None else cls(known_lr, _rate(lr_backbone), batch if _is_count(batch) else None)

    def to_arguments(self) -> dict[str, Any]:
        """Return the values under which a search's output keeps them in its `args`."""
        return dict(zip(NOTED, (self.lr, self.lr_backbone, self.batch), strict=True))


def noted_by_search(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a search noted of the dense detector's training in a checkpoint's `args`; empty if it noted none."""
    return {name: arguments[name] for name in NOTED if name in arguments}


def _rate(value: Any) -> float | None:
    return value if type(value) in (int, float) and 0 < value <= 1 else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
