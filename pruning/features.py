"""What a search computes once and keeps: the features of every image, and the state in front of one module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine import autocast
from models.state import DetectorState
from util.logging import get_logger

Targets = list[dict[str, Tensor]]

USABLE_SHARE = 0.8  # of a GPU's free memory: a search's forwards need some, too


@dataclass
class PassCounter:
    """How often images went through which part of a network.

    Attributes:
        step_shares: share of a whole pass behind the backbone that each step costs; sums to 1.
        backbone_images: images through the backbone and everything in front of the first step.
        images_by_range: images through the steps from one name (included) to another (excluded, None: the end).
    """

    step_shares: Mapping[str, float]
    backbone_images: int = 0
    images_by_range: dict[tuple[str, str | None], int] = field(default_factory=dict)

    def add(self, start: str, stop: str | None, images: int) -> None:
        """Count `images` through the steps from `start` to in front of `stop`."""
        key = (start, stop)
        self.images_by_range[key] = self.images_by_range.get(key, 0) + images

    @property
    def images(self) -> int:
        """Images through any range of steps, however short."""
        return sum(self.images_by_range.values())

    @property
    def whole_passes(self) -> float:
        """Images through the network behind the backbone, a part of it counting as its share."""
        return sum(images * self._share(*key) for key, images in self.images_by_range.items())

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON takes them."""
        ranges = {f"{start}:{stop or 'end'}": images for (start, stop), images in self.images_by_range.items()}
        return {
            "backbone_images": self.backbone_images,
            "images": self.images,
            "whole_passes": round(self.whole_passes, 3),
            "images_by_range": ranges,
        }

    def _share(self, start: str, stop: str | None) -> float:
        names = list(self.step_shares)
        last = len(names) if stop is None else names.index(stop)
        return sum(self.step_shares[name] for name in names[names.index(start) : last])


class StateCache:
    """The states of a set of images in front of one module, moved along the network as a search moves.

    Everything in front of the first step runs once for each image, when the cache is made. `move_to` runs the steps
    between the module before and the next one, under the gates as they are; it starts again from the features only to
    go back.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Collection[tuple[list[Tensor], Targets]],
        counter: PassCounter,
        *,
        device: torch.device,
        cache_device: torch.device | None = None,
        amp: str = "off",
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        """Run the front of `model` (its `prepare`) over `loader` and keep the states on `cache_device`.

        None keeps them on `device`, or on the CPU if that is a GPU whose memory they would fill.
        """
        self._model = model
        self.counter = counter
        self._device = device
        self.cache_device = cache_device
        self._amp = amp
        self._features: list[DetectorState] = []
        self.targets: list[Targets] = []
        with torch.no_grad(), autocast(device, amp):
            for images, targets in progress(loader):
                state = model.prepare([image.to(device) for image in images])
                counter.backbone_images += len(images)
                if self.cache_device is None:
                    self.cache_device = fitting_device(bytes_needed(state, model.step_names) * len(loader), device)
                self._features.append(state.to(self.cache_device))
                self.targets.append([_without_images(target) for target in targets])
        self._states = list(self._features)
        self.position: str = model.step_names[0]

    def __len__(self) -> int:
        return len(self._features)

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(len, self.targets))

    @property
    def nbytes(self) -> int:
        """Bytes that the cached states hold, shared ones counted once."""
        return _storage_bytes([*self._features, *self._states])

    def state(self, batch: int) -> DetectorState:
        """The state of one batch in front of the module under search, on the cache's device."""
        return self._states[batch]

    def batches(self, indices: Sequence[int] | None = None) -> list[tuple[DetectorState, Targets]]:
        """Pairs of state and targets, of all batches or those named; what `engine.evaluate` takes as its loader."""
        return [(self._states[i], self.targets[i]) for i in (range(len(self)) if indices is None else indices)]

    def predict(self, state: DetectorState) -> dict[str, Any]:
        """The detector's outputs from a state in front of the module under search."""
        self.counter.add(self.position, None, len(state.queries))
        with autocast(self._device, self._amp):
            return self._model.outputs(self._model.run_steps(state, self.position))

    def forget(self) -> None:
        """Go back to the features: what is behind them was made with other weights or gates."""
        self._states, self.position = list(self._features), self._model.step_names[0]

    def move_to(self, name: str) -> None:
        """Put the states in front of module `name`."""
        order = self._model.step_names
        if order.index(name) < order.index(self.position):
            self.forget()
        if name == self.position:
            return
        with torch.no_grad(), autocast(self._device, self._amp):
            for index, state in enumerate(self._states):
                on_device = state.to(self._device)
                self.counter.add(self.position, name, len(state.queries))
                moved = self._model.run_steps(on_device, self.position, name)
                self._states[index] = _keep_unchanged(state, on_device, moved, self.cache_device)
        self.position = name


def bytes_needed(state: DetectorState, step_names: Sequence[str]) -> int:
    """Bytes that a cache holds at most for a batch: its features, and beside them its state behind the last step."""
    layers = sum(name.startswith("decoder.") and name.endswith(".ffn") for name in step_names)
    # The encoded features, and the queries: content, position and sine, and what each layer leaves.
    return _storage_bytes([state]) + state.memory.nbytes + (3 + layers) * state.queries.nbytes


def fitting_device(needed: int, device: torch.device) -> torch.device:
    """`device` if `needed` bytes fit it, else the CPU, which the log then says; a CPU is not asked."""
    if device.type != "cuda":
        return device
    free = _free_bytes(device)
    if needed <= USABLE_SHARE * free:
        return device
    get_logger().info(
        "features are kept in RAM: they may take %.1f GB, and %s has %.1f GB free", needed / 1e9, device, free / 1e9
    )
    return torch.device("cpu")


def repeat_batch(state: DetectorState, copies: int) -> DetectorState:
    """`state` with its whole batch repeated, copy-major; tensors that serve all images stay as they are."""
    images = len(state.queries)

    def repeat(tensor: Tensor) -> Tensor:
        return tensor if len(tensor) != images else tensor.repeat(copies, *[1] * (tensor.dim() - 1))

    return state.map(repeat)


def split_outputs(outputs: dict[str, Any], copies: int) -> list[dict[str, Any]]:
    """The outputs of a repeated batch, taken apart into those of each copy."""
    parts: list[dict[str, Any]] = [{} for _ in range(copies)]
    for key, value in outputs.items():
        if isinstance(value, Tensor):
            pieces: Sequence[Any] = value.chunk(copies)
        else:
            pieces = list(zip(*(split_outputs(layer, copies) for layer in value), strict=True)) or [()] * copies
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece if isinstance(piece, Tensor) else list(piece)
    return parts


def _storage_bytes(states: Iterable[DetectorState]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in states for t in s.tensors()}
    return sum(storages.values())


def _free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, those that torch has set aside for itself included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _without_images(target: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in target.items() if isinstance(value, Tensor)}


def _keep_unchanged(
    cached: DetectorState, before: DetectorState, after: DetectorState, device: torch.device
) -> DetectorState:
    """`after` on `device`, holding the tensors of `cached` wherever the steps did not touch them."""
    held = {id(old): kept for old, kept in zip(before.tensors(), cached.tensors(), strict=True)}
    return after.map(lambda tensor: held[id(tensor)] if id(tensor) in held else tensor.to(device))
