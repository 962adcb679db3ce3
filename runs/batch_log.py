"""Log lines of training batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from torch import Tensor

from engine import Means
from util import distributed
from util.logging import get_logger

SHOWN = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error")


class BatchLog:
    """Log every few batches: mean losses since the last line, learning rate, time left.

    Call it after each batch, in every process.

    Args:
        every: batches between two lines, 0 for no lines.
        epoch: number of the epoch, from 0.
        epochs: epochs of the run.
        batches: batches of an epoch in one process.
        show: called with the values of a line (losses, `lr`, `images_per_second`) and the batches done in this epoch.
    """

    def __init__(
        self, every: int, epoch: int, epochs: int, batches: int, show: Callable[[Mapping[str, float], int], None]
    ) -> None:
        self.every, self.epoch, self.epochs, self.batches, self.show = every, epoch, epochs, batches, show
        self._done = 0
        self._means, self._images, self._since = Means(), 0, time.perf_counter()

    def __call__(self, losses: Mapping[str, Tensor], images: int, lr: float) -> None:
        """Count one batch.

        Args:
            losses: of the batch, averaged over all processes.
            images: in the batch of this process.
            lr: learning rate of the transformer in its optimizer step.
        """
        if not self.every:
            return
        self._done += 1
        self._means.add(losses)
        self._images += images
        if self._done % self.every and self._done < self.batches:
            return
        means = self._means.read()
        seconds = time.perf_counter() - self._since
        rate = self._images * distributed.world_size() / seconds
        counted = (self._done - 1) % self.every + 1
        ahead = (self.epochs - self.epoch) * self.batches - self._done
        left, left_of_run = (
            timedelta(seconds=round(seconds / counted * n)) for n in (self.batches - self._done, ahead)
        )
        done = f"epoch {self.epoch} [{self._done:{len(str(self.batches))}}/{self.batches}]"
        shown = [f"{name} {means[name]:.4f}" for name in SHOWN if name in means]
        times = f"{left} left, of all epochs {left_of_run}"
        get_logger().info("  ".join([done, *shown, f"lr {lr:.2e}", f"{rate:.1f} images/s", times]))
        self.show({**means, "lr": lr, "images_per_second": rate}, self._done)
        self._means, self._images, self._since = Means(), 0, time.perf_counter()
