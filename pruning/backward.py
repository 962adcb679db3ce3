"""Compute the loss of a batch and its gradients, in pieces that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from engine import autocast, move_to
from models.criterion import Criterion
from models.detector import Detector
from models.state import BackboneState, DetectorState, State, StateT
from pruning.state_cache import Targets
from util.errors import UserError
from util.memory import USABLE_SHARE, PeakMemory, free_bytes

FIRST_SCALE = 2.0**16  # initial loss scale in fp16, which keeps small gradients from becoming 0


class LossGradients:
    """Backward passes from the loss of a batch, which is split by images into pieces that fit into memory.

    Each piece is normalised by the boxes of the whole batch, so that losses and gradients of the pieces add up to those
    of the batch. The same holds for parts of a batch that was divided by image size. An image larger than all before is
    a piece by itself, to measure the memory that it takes.

    Attributes:
        pixels: of the last piece, B x S, 1 on image pixels of the encoder and 0 on padding.
    """

    pixels: Tensor

    def __init__(self, model: Detector, criterion: Criterion, device: torch.device, amp: str = "off") -> None:
        """`amp` is off, bf16 or fp16, for the forward pass; gradients are float32."""
        self._model = model
        self._criterion = criterion
        self._device = device
        self._amp = amp
        self._largest_pixels, self._image_bytes = 0, 0
        self._most_images: float = math.inf
        self._scale = FIRST_SCALE if amp == "fp16" else 1.0

    def of_batch(
        self,
        state: State,
        targets: Targets,
        start: str,
        wanted: Callable[[], Sequence[Tensor]],
        before: Callable[[int], None] = lambda images: None,
        whole: Targets | None = None,
    ) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """Yield the number of images, loss and gradients of each piece.

        The losses add up to the loss of the whole batch times its number of images.

        Args:
            state: at the input of step `start`.
            targets: on any device.
            wanted: returns, after the forward pass of a piece, the tensors to differentiate by.
            before: called with the number of images before each piece.
            whole: targets of the whole batch, of which `targets` are a part; None if they are all.

        Raises:
            UserError: a GPU has too little memory for one image.
        """
        targets, done = move_to(targets, self._device), 0
        whole = targets if whole is None else whole
        num_boxes = sum(len(target["labels"]) for target in whole)
        while done < len(targets):
            pixels = state.pixels_of_image
            memory = PeakMemory() if pixels > self._largest_pixels else None
            images = 1 if memory else self._images_at_once(len(targets) - done)
            part = slice(done, done + images)
            before(images)
            with self._criterion.normalised_by(num_boxes), memory or nullcontext():
                found = self._go_backward(take_images(state, part), targets[part], start, wanted, len(whole))
            if found is None:
                self._halve(images)
                continue
            if memory:
                self._largest_pixels, self._image_bytes = pixels, max(memory.peak_bytes, self._image_bytes)
            done += images
            yield images, *found

    def _images_at_once(self, images: int) -> int:
        """Halve `images` until they fit into free memory."""
        free = USABLE_SHARE * free_bytes(self._device)
        while images > 1 and (images * self._image_bytes > free or images > self._most_images):
            images = -(-images // 2)
        return images

    def _halve(self, images: int) -> None:
        """Halve the most images of a piece after a GPU ran out of memory."""
        if images == 1:
            raise UserError(
                f"{self._device}: found too little memory for the gradients of one image of the search, expected "
                "a smaller --image_size, --amp or --cache_device cpu"
            )
        torch.cuda.empty_cache()
        self._most_images = images / 2

    def _go_backward(
        self,
        state: State,
        targets: Targets,
        start: str,
        wanted: Callable[[], Sequence[Tensor]],
        images_of_batch: int,
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Return the loss of the images and its gradients, or None if a GPU has too little memory."""
        try:
            with torch.enable_grad():
                with autocast(self._device, self._amp):
                    state, first = _with_graph(state), self._model.step_names[0]
                    if isinstance(state, BackboneState):
                        state, start = self._model.run_steps(state, start, first), first
                    assert isinstance(state, DetectorState)
                    self.pixels = state.pixels
                    outputs = self._model.outputs(self._model.run_steps(state, start))
                loss = images_of_batch * self._criterion.weighted_sum(self._criterion(outputs, targets))
            return loss.detach(), self._gradients(loss, list(wanted()))
        except torch.OutOfMemoryError:
            return None

    def _gradients(self, loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        """Return the gradients in float32; in fp16 the loss is scaled, and the scale lowered until none overflows."""
        while self._scale > 1:
            scaled = torch.autograd.grad(loss * self._scale, wanted, retain_graph=True)
            if all(gradient.isfinite().all() for gradient in scaled):
                return [gradient.float() / self._scale for gradient in scaled]
            self._scale /= 4
        return [gradient.float() for gradient in torch.autograd.grad(loss, wanted)]


def take_images(state: StateT, part: slice) -> StateT:
    """Take the images `part` of a batch; tensors that all images share are unchanged."""
    images = state.num_images
    return state.map(lambda tensor: tensor[part] if len(tensor) == images else tensor)


def _with_graph(state: State) -> State:
    """Make gradients flow from a state even if all parameters are frozen."""
    if isinstance(state, BackboneState):
        return state.replace(maps=state.maps.detach().clone().requires_grad_())
    assert isinstance(state, DetectorState)
    return state.replace(
        memory=state.memory.detach().clone().requires_grad_(), queries=state.queries.detach().clone().requires_grad_()
    )
