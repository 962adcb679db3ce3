"""The loss of a batch and its gradients, in pieces that fit the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from engine import autocast, move_to
from models.criterion import Criterion
from models.detector import Detector
from models.state import DetectorState
from pruning.state_cache import Targets
from util.errors import UserError
from util.memory import USABLE_SHARE, PeakMemory, free_bytes

FIRST_SCALE = 2.0**16  # of a loss in fp16, so that small gradients do not become 0


class LossGradients:
    """Goes backward from the loss of a batch; a batch that does not fit the memory is cut into pieces by its images.

    Each piece is normalised by the boxes of the whole batch, so that losses and gradients of the pieces add up to those
    of the batch. The first image of a larger size than all before is a piece of its own, of which the memory that an
    image takes is measured.
    """

    def __init__(self, model: Detector, criterion: Criterion, device: torch.device, amp: str = "off") -> None:
        """`amp` is off, bf16 or fp16, for the forward pass; gradients come as float32."""
        self._model = model
        self._criterion = criterion
        self._device = device
        self._amp = amp
        self._largest_pixels, self._image_bytes = 0, 0
        self._most_images: float = math.inf
        self._scale = FIRST_SCALE if amp == "fp16" else 1.0

    def of_batch(
        self,
        state: DetectorState,
        targets: Targets,
        start: str,
        wanted: Callable[[], Sequence[Tensor]],
        before: Callable[[int], None] = lambda images: None,
    ) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """Number of images, loss and gradients of each piece; the losses add up to the batch's, times its images.

        Args:
            state: in front of step `start`.
            targets: on any device.
            wanted: gives, after the forward pass of a piece, what its gradients are taken of.
            before: called with the number of images of each piece before it is run.

        Raises:
            UserError: a GPU has too little memory for one image.
        """
        targets, done = move_to(targets, self._device), 0
        num_boxes = sum(len(target["labels"]) for target in targets)
        while done < len(targets):
            pixels = state.memory.shape[1]
            memory = PeakMemory() if pixels > self._largest_pixels else None
            images = 1 if memory else self._images_at_once(len(targets) - done)
            part = slice(done, done + images)
            before(images)
            with self._criterion.normalised_by(num_boxes), memory or nullcontext():
                found = self._go_backward(take_images(state, part), targets[part], start, wanted, len(targets))
            if found is None:
                self._halve(images)
                continue
            if memory:
                self._largest_pixels, self._image_bytes = pixels, max(memory.peak_bytes, self._image_bytes)
            done += images
            yield images, *found

    def _images_at_once(self, images: int) -> int:
        """`images`, halved until they fit what is free."""
        free = USABLE_SHARE * free_bytes(self._device)
        while images > 1 and (images * self._image_bytes > free or images > self._most_images):
            images = -(-images // 2)
        return images

    def _halve(self, images: int) -> None:
        """A GPU had too little memory for so many images: take half of them."""
        if images == 1:
            raise UserError(
                f"{self._device}: found too little memory for the gradients of one image of the search, expected "
                "a smaller --image_size, --amp or --cache_device cpu"
            )
        torch.cuda.empty_cache()
        self._most_images = images / 2

    def _go_backward(
        self,
        state: DetectorState,
        targets: Targets,
        start: str,
        wanted: Callable[[], Sequence[Tensor]],
        images_of_batch: int,
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Loss of the images and its gradients; None where a GPU has too little memory."""
        try:
            with torch.enable_grad():
                with autocast(self._device, self._amp):
                    outputs = self._model.outputs(self._model.run_steps(_with_graph(state), start))
                loss = images_of_batch * self._criterion.weighted_sum(self._criterion(outputs, targets))
            return loss.detach(), self._gradients(loss, list(wanted()))
        except torch.OutOfMemoryError:
            return None

    def _gradients(self, loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        """Gradients in float32; in fp16 of the loss times a scale that is lowered until none overflows."""
        while self._scale > 1:
            scaled = torch.autograd.grad(loss * self._scale, wanted, retain_graph=True)
            if all(gradient.isfinite().all() for gradient in scaled):
                return [gradient.float() / self._scale for gradient in scaled]
            self._scale /= 4
        return [gradient.float() for gradient in torch.autograd.grad(loss, wanted)]


def take_images(state: DetectorState, part: slice) -> DetectorState:
    """Some images of a batch; tensors that serve all images stay as they are."""
    images = len(state.queries)
    return state.map(lambda tensor: tensor[part] if len(tensor) == images else tensor)


def _with_graph(state: DetectorState) -> DetectorState:
    """A state from which gradients flow, whatever parameters are frozen."""
    return state.replace(
        memory=state.memory.detach().clone().requires_grad_(), queries=state.queries.detach().clone().requires_grad_()
    )
