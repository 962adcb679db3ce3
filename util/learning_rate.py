"""The learning rate of a training run, as a function of the fraction of the run that is done."""

import math

SCHEDULES = ("step", "cosine")


def rate(fraction: float, schedule: str, *, warmup: float = 0.0, drop: float = 1.0) -> float:
    """Factor of the learning rates: a linear warm-up, then drops to a tenth or a half cosine to 0.

    It depends on the fraction alone, so a run that is resumed with other batches continues at the right rate.

    Args:
        fraction: of the run that is done, in [0, 1].
        schedule: one of `SCHEDULES`.
        warmup: fraction of the run in which the factor rises from 0 to 1; from 1 up it never gets there.
        drop: fraction of the run between two drops; only "step" reads it.
    """
    fraction = min(fraction, 1.0)
    if warmup > 0 and fraction <= warmup:
        return fraction / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
    return 0.1 ** int(fraction / drop)
