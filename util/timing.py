"""How long calls take side by side, and a detector for an image."""

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
    """Seconds of each call, round by round.

    The calls take turns, so that a busy moment of the machine hits all of them alike. On one thread of the CPU they
    are those that the process was given, so that waiting for other work is left out.

    Args:
        device: that the calls run on.
        rounds: how often each is measured.
        warm_up: rounds that are run first and not counted.
        on_turn: called behind each round, those to warm up too.
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
    """Median time of one image alone, for each model, side by side.

    Args:
        models: detectors in eval mode, on the device to measure.
        images: 3 x H x W each, normalised, on the same device.
        rounds: how often each image is measured.
        warm_up: images that are run once before they are measured.
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
