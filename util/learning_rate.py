"""Learning rate as a function of the completed fraction of a training run."""

import math

SCHEDULES = ("step", "cosine")


def rate(fraction: float, schedule: str, *, warmup: float = 0.0, drop: float = 1.0) -> float:
    """Return the learning rate factor: linear warm-up, then drops to a tenth or a half cosine to 0.

    It only depends on the fraction, so a run resumed with another batch size continues at the right rate.

    Args:
        fraction: completed fraction of the run, in [0, 1].
        schedule: one of `SCHEDULES`.
        warmup: fraction of the run in which the factor rises from 0 to 1; with 1 or more, it never reaches 1.
        drop: fraction of the run between two drops; only used by "step".
    """
    fraction = min(fraction, 1.0)
    if warmup > 0 and fraction <= warmup:
        return fraction / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
    return 0.1 ** int(fraction / drop)
