"""Time calls side by side, and detectors per image."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def seconds_side_by_side(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 1,
    on_turn: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round.

    The calls take turns, so that load on the machine affects all alike. On one CPU thread this is process time, which
    excludes waiting for other processes.

    Args:
        device: device that the calls run on.
        rounds: measurements of each call.
        warm_up: rounds to run first, not measured.
        on_turn: called after each round, including warm-up.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            _wait_for(device)
            start = clock()
            call()
            _wait_for(device)
            if turn >= warm_up:
                seconds[name].append(clock() - start)
        on_turn()
    return seconds


@torch.no_grad()
def milliseconds_per_image(
    models: Mapping[str, nn.Module], images: Sequence[Tensor], *, rounds: int = 5, warm_up: int = 3
) -> dict[str, float]:
    """Return the median time for a single image, for each model, measured side by side.

    Args:
        models: detectors in eval mode, on the device to measure.
        images: 3 x H x W each, normalised, on the same device.
        rounds: measurements of each image.
        warm_up: images to run once before measuring.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index, image in enumerate(images):
        calls = {name: functools.partial(model, [image]) for name, model in models.items()}
        found = seconds_side_by_side(calls, image.device, rounds=rounds, warm_up=int(index < warm_up))
        for name, values in found.items():
            seconds[name] += values
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
