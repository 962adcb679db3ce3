"""Cache the features of every image and its state at the input of the module being searched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from datasets.coco import CocoLoader
from engine import autocast
from models.detector import Detector
from models.state import BackboneState, Features, State, StateT
from pruning.cache_plan import Plan, Storage
from util.memory import PeakMemory, storage_bytes
from util.phases import BACKBONE, TRANSFORMER, TimedBatches, phase

Targets = list[dict[str, Tensor]]


@dataclass
class PassCounter:
    """Count the images that pass through each part of a network.

    Attributes:
        step_shares: cost of each step as a share of a whole pass after `backbone_images`; sums to 1.
        backbone_images: images through everything before the first step: the backbone, or its stem if the steps begin
            with residual blocks.
        moment_macs: multiply-accumulates for the moments that fits use.
        images_by_range: images through the steps from one name to another (excluded; None for the end).
        end: first step of the decoder layers that are dropped, where passes end; None without such.
    """

    step_shares: Mapping[str, float]
    backbone_images: int = 0
    moment_macs: int = 0
    images_by_range: dict[tuple[str, str | None], int] = field(default_factory=dict)
    end: str | None = None

    def add(self, start: str, stop: str | None, images: int) -> float:
        """Count `images` through the steps from `start` until before `stop`; return how many whole passes that is."""
        key = (start, self.end if stop is None else stop)
        self.images_by_range[key] = self.images_by_range.get(key, 0) + images
        return images * self._share(*key)

    @property
    def images(self) -> int:
        """Images through any range of steps."""
        return sum(self.images_by_range.values())

    @property
    def whole_passes(self) -> float:
        """Images through all steps; a part of them counts as its share of the cost."""
        return sum(images * self._share(*key) for key, images in self.images_by_range.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        ranges = {f"{start}:{stop or 'end'}": images for (start, stop), images in self.images_by_range.items()}
        return {
            "backbone_images": self.backbone_images,
            "moment_macs": self.moment_macs,
            "images": self.images,
            "whole_passes": round(self.whole_passes, 3),
            "images_by_range": ranges,
        }

    def _share(self, start: str, stop: str | None) -> float:
        names = list(self.step_shares)
        last = len(names) if stop is None else names.index(stop)
        return sum(self.step_shares[name] for name in names[names.index(start) : last])


@dataclass(frozen=True)
class StoredState:
    """State of a batch at the input of module `position`, on the storage device, and its size."""

    position: str
    state: State
    nbytes: int


@dataclass
class _Memory:
    """Bytes that a cache and its twin hold."""

    nbytes: int = 0


class StateCache:
    """Cached states of all images at the input of the module being searched (`position`).

    Everything before the first step of the scope runs once for each image, in the constructor. What it gives is called
    features here: those of the backbone, or for the scope `detector` those of its stem. `state` runs a batch from its
    last cached position to the current one, with the current gates and weights of the modules between, which must not
    change after the search has left them. What does not fit `storage.max_bytes` is not cached: states are recomputed
    from the features, and features from the images.
    """

    def __init__(
        self,
        model: Detector,
        batches: CocoLoader,
        counter: PassCounter,
        *,
        device: torch.device,
        scope: str = "transformer",
        numbers: Sequence[int] | None = None,
        plan: Plan | None = None,
        amp: str = "off",
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        """Compute the features (`model.front`) of all `batches`.

        Args:
            scope: one of `models.prunable.SCOPES`; for `detector` the images of a batch have one size, unless the
                padding rule is the reference's.
            numbers: for each of `batches`, the index of the split's batch that its images are from. Several have the
                same one if a batch of the split is divided by image size. None if no batch is divided.
            plan: chooses the storage, given the features of the first batch and the peak bytes of computing them;
                None keeps everything unchanged on `device`.
            progress: wraps `batches` to show a bar.
        """
        self._model = model
        self._batches = batches
        self.counter = counter
        self._device = device
        self.storage = Storage(device)
        self._plan = plan
        self._amp = amp
        self.scope = scope
        self._numbers = numbers
        self._features: list[Features | BackboneState | None] = []
        self._stored: dict[int, StoredState] = {}
        self._memory = _Memory()
        self.targets: list[Targets] = []
        self.steps = model.steps_in(scope)
        self.position: str = self.steps[0]
        for images, targets in TimedBatches(progress(batches)):
            self._keep_features(self._first_features(images) if not self._features else self._run_front(images))
            self.targets.append([_without_images(target) for target in targets])

    def twin(self, model: Detector) -> StateCache:
        """Return a cache of the states of `model`, which has the same weights before its first step.

        It may have fewer decoder layers.

        Both share images, features and the memory that is left.
        """
        other = copy.copy(self)
        other._model, other._stored, other.position = model, {}, self.steps[0]
        other.steps = model.steps_in(self.scope)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of features and states, those of a twin included."""
        return self._memory.nbytes

    def __len__(self) -> int:
        return len(self.targets)

    def parts_of(self, batch: int) -> list[int]:
        """Return the batches that hold the images of one batch of the split, that of `batch`."""
        numbers = range(len(self)) if self._numbers is None else self._numbers
        return [place for place, number in enumerate(numbers) if number == numbers[batch]]

    def split_batch(self, batch: int) -> Targets:
        """Return the targets of the whole batch of the split that `batch` is part of."""
        return [target for part in self.parts_of(batch) for target in self.targets[part]]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(len, self.targets))

    def images_without_features(self, batches: Sequence[int] | None = None) -> int:
        """Return how many images of all or the given batches have no features here, so that each pass reads them."""
        chosen = range(len(self)) if batches is None else batches
        return sum(len(self.targets[batch]) for batch in chosen if self._features[batch] is None)

    def states(self, batches: Sequence[int] | None = None, is_kept: bool = True) -> Iterator[tuple[Any, Targets]]:
        """Yield the state and targets of all or the given batches, as a loader for `engine.evaluate`; see `state`.

        Images whose features are not cached are prefetched in one pass.
        """
        chosen = range(len(self)) if batches is None else batches
        unread = {batch for batch in chosen if batch not in self._stored and self._features[batch] is None}
        images = iter(TimedBatches(self._batches.read([n for n in chosen if n in unread]) if unread else ()))
        for batch in chosen:
            yield self.state(batch, is_kept, next(images)[0] if batch in unread else None), self.targets[batch]

    @torch.no_grad()
    def state(self, batch: int, is_kept: bool = True, images: list[Tensor] | None = None) -> Any:
        """Return the state of one batch at the input of the module being searched, on the device.

        Args:
            is_kept: whether to cache the state; False if it will not be used again.
            images: images of the batch if already read; otherwise they are read when needed.
        """
        with autocast(self._device, self._amp):
            stored = self._stored.get(batch)
            before: State
            if stored is None:
                start, before = self.steps[0], self._model.start(self._features_of(batch, images))
            else:
                start, before = stored.position, stored.state.to(self._device)
            if start == self.position:
                return before
            with phase(TRANSFORMER, self.counter.add(start, self.position, before.num_images)):
                after = self._model.run_steps(before, start, self.position)
        if is_kept:
            self._keep_state(batch, before, after)
        return after

    def predict(self, state: State) -> dict[str, Any]:
        """Return the detector's outputs from a state at the input of the module being searched."""
        passes = self.counter.add(self.position, None, state.num_images)
        with phase(TRANSFORMER, passes), autocast(self._device, self._amp):
            return self._model.outputs(self._model.run_steps(state, self.position))

    def step_after(self, name: str) -> str | None:
        """Return the step after `name`, None after the last."""
        following = self.steps.index(name) + 1
        return self.steps[following] if following < len(self.steps) else None

    def forget(self) -> None:
        """Drop all states, which other weights or gates made, and go back to the features."""
        self._memory.nbytes -= sum(stored.nbytes for stored in self._stored.values())
        self._stored.clear()
        self.position = self.steps[0]

    def move_to(self, name: str) -> None:
        """Set the position to the input of module `name`; states are computed on demand."""
        order = self.steps
        if order.index(name) < order.index(self.position):
            self.forget()
        self.position = name

    @torch.no_grad()
    def _run_front(self, images: list[Tensor]) -> Features | BackboneState:
        self.counter.backbone_images += len(images)
        with phase(BACKBONE, len(images)), autocast(self._device, self._amp):
            return self._model.front([image.to(self._device) for image in images], self.scope)

    def _first_features(self, images: list[Tensor]) -> Features | BackboneState:
        """Compute the features of the first batch and choose the storage by them."""
        with PeakMemory() as memory:
            features = self._run_front(images)
        if self._plan is not None:
            self.storage = self._plan(features, memory.peak_bytes)
        self._made_dtype = features.content.dtype
        return features

    def _keep_features(self, features: Features | BackboneState) -> None:
        max_bytes = self.storage.max_bytes
        if max_bytes < math.inf:
            max_bytes -= min(self.storage.state_bytes, max_bytes / 2)
        kept = features.to(self.storage.device, self.storage.dtype)
        fits = self.nbytes + kept.nbytes <= max_bytes
        self._features.append(kept if fits else None)
        self._memory.nbytes += kept.nbytes if fits else 0

    def _features_of(self, batch: int, images: list[Tensor] | None) -> Features | BackboneState:
        features = self._features[batch]
        if features is None:
            images = next(iter(TimedBatches(self._batches.read([batch]))))[0] if images is None else images
            # Round like cached features, so that the memory limit changes no result.
            features = self._run_front(images).to(self._device, self.storage.dtype)
        return features.to(self._device, self._made_dtype)

    def _keep_state(self, batch: int, before: State, after: State) -> None:
        """Replace the cached state `before` by `after` if it fits."""
        stored, device = self._stored.get(batch), self.storage.device
        state = after.to(device) if stored is None else _stored_after(stored.state, before, after, device)
        nbytes = storage_bytes(state.tensors())
        more = nbytes - (0 if stored is None else stored.nbytes)
        if self.nbytes + more <= self.storage.max_bytes:
            self._stored[batch] = StoredState(self.position, state, nbytes)
            self._memory.nbytes += more


def repeat_batch(state: StateT, copies: int) -> StateT:
    """Repeat the batch of a state, copy-major; tensors that all images share are unchanged."""
    images = state.num_images

    def repeat(tensor: Tensor) -> Tensor:
        return tensor if len(tensor) != images else tensor.repeat(copies, *[1] * (tensor.dim() - 1))

    return state.map(repeat)


def split_outputs(outputs: dict[str, Any], copies: int) -> list[dict[str, Any]]:
    """Split the outputs of a repeated batch into those of each copy."""
    parts: list[dict[str, Any]] = [{} for _ in range(copies)]
    for key, value in outputs.items():
        if isinstance(value, Tensor):
            pieces: Sequence[Any] = value.chunk(copies)
        else:
            pieces = list(zip(*(split_outputs(layer, copies) for layer in value), strict=True)) or [()] * copies
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece if isinstance(piece, Tensor) else list(piece)
    return parts


def _without_images(target: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in target.items() if isinstance(value, Tensor)}


def _stored_after(stored: State, before: State, after: State, device: torch.device) -> State:
    """Move `after` to `device`, reusing tensors of `stored` (the state `before` on that device) where unchanged."""
    if type(after) is not type(before):  # the features of a `BackboneState` became a `DetectorState`
        return after.to(device)

    def store(kept: Any, old: Any, new: Any) -> Any:
        if new is old:
            return kept
        if isinstance(new, tuple):  # steps only append
            return (*kept, *(tensor.to(device) for tensor in new[len(old) :]))
        return new.to(device) if isinstance(new, Tensor) else new

    values = {f.name: [getattr(state, f.name) for state in (stored, before, after)] for f in fields(after)}
    return after.replace(**{name: store(*states) for name, states in values.items()})
