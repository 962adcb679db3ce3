"""Losses and gradient norm of a training batch, checked when the device has computed them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from util import distributed
from util.errors import NonFiniteLossError
from util.logging import get_logger, table


class BatchRecord:
    """What is known of a training batch; `losses` are averaged over the processes.

    `start_copy` copies the loss and the gradient norm to the CPU without waiting for a GPU. `check`, called one batch
    later, finds them there: matching has waited for the GPU meanwhile.

    Args:
        own: each loss of this process in the order of computation, and `loss`, their weighted sum.
        targets: of this process's images, each with `image_id`.
        rates: learning rates of the optimizer step.
        place: epoch and step; begins the messages.
    """

    def __init__(
        self,
        own: Mapping[str, Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        rates: Sequence[float],
        place: str,
    ) -> None:
        with torch.no_grad():
            self._own = dict(zip(own, torch.stack([*own.values()]).unbind(), strict=True))
        self.losses, self.targets, self.rates, self.place = distributed.average(self._own), targets, rates, place
        self._in_step: Sequence[Mapping[str, Tensor]] = ()
        self._on_cpu = torch.empty(0)
        self._copied: torch.cuda.Event | None = None

    def start_copy(self, norm: Tensor | None = None, in_step: Sequence[Mapping[str, Tensor]] = ()) -> None:
        """Copy the loss and, if it is given, the norm of the gradient; it may be over several batches.

        Args:
            norm: scalar.
            in_step: targets of this process's images of which it is the gradient.
        """
        self._in_step = in_step
        numbers = [self.losses["loss"], *([] if norm is None else [norm])]
        stacked = torch.stack([number.detach().double() for number in numbers])
        self._on_cpu = stacked.to("cpu", non_blocking=True)  # to pinned memory
        if stacked.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def check(self) -> float:
        """Return the loss.

        Raises:
            NonFiniteLossError: the loss or the gradient's norm is not finite; raised in all processes.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, *norm = self._on_cpu.tolist()
        if not math.isfinite(loss):
            raise self._bad_loss()
        if norm and not math.isfinite(norm[0]):
            raise bad_gradient(self.place, self._in_step)
        return loss

    def _bad_loss(self) -> NonFiniteLossError:
        """Log all losses; return the error with the images of the processes whose own losses are not finite."""
        values = {name: float(value) for name, value in self._own.items()}
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        parts = distributed.gather_objects((bad, _image_ids(self.targets)))
        of_bad = [part for part in parts if part[0]]
        parts = of_bad or [(["the average of loss is not finite"], images) for _, images in parts]
        images = sorted(image for _, ids in parts for image in ids)
        message = f"{self.place}: {parts[0][0][0]}, on the images {images}"
        averages = [(name, float(value)) for name, value in sorted(self.losses.items())]
        get_logger().error("%s\n%s", message, table(["loss", "value"], averages))
        return NonFiniteLossError(message)


def bad_gradient(place: str, targets: Sequence[Mapping[str, Tensor]]) -> NonFiniteLossError:
    """Return the error for a bad gradient with the images of all processes, which share the gradient."""
    images = sorted(image for part in distributed.gather_objects(_image_ids(targets)) for image in part)
    return NonFiniteLossError(f"{place}: the gradient is not finite, on the images {images}")


def _image_ids(targets: Sequence[Mapping[str, Tensor]]) -> list[int]:
    return sorted(int(target["image_id"]) for target in targets)
