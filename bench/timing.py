"""How long a detector takes for an image, several detectors side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def milliseconds_per_image(
    models: Mapping[str, nn.Module], images: Sequence[Tensor], *, rounds: int = 5, warm_up: int = 3
) -> dict[str, float]:
    """Median time of one image alone, for each model.

    The models take turns image by image, so that a busy moment of the machine hits all of them alike.

    Args:
        models: detectors in eval mode, on the device to measure.
        images: 3 x H x W each, normalised, on the same device.
        rounds: how often each image is measured.
        warm_up: images that are run first and not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for image in images[:warm_up]:
        for model in models.values():
            model([image])
    for _ in range(rounds):
        for image in images:
            for name, model in models.items():
                _wait_for(image.device)
                start = time.perf_counter()
                model([image])
                _wait_for(image.device)
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
