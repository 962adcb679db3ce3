"""Choose the device and precision of a search's cached features and states by the memory they need."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine import autocast
from models.detector import Detector
from models.state import BackboneState, DetectorState, Features
from pruning.fit_memory import fit_memory
from pruning.layer_outputs import kept_outputs
from util import distributed
from util.errors import UserError
from util.logging import Notice, show
from util.memory import USABLE_SHARE, PeakMemory, free_bytes, storage_bytes

CPU = torch.device("cpu")
GB = 1e9
# Memory that calibration keeps (outputs of a module, weights of all tokens) per byte of the features in float32.
CALIBRATION_SHARE = 1.5


@dataclass(frozen=True)
class BatchShape:
    """The images of one batch.

    Attributes:
        images: number of images.
        pixels: height times width of one image, padded as in the batch.
        is_padded: whether the images differ in size.
    """

    images: int
    pixels: int
    is_padded: bool


def shape_of(sizes_hw: Sequence[tuple[int, int]]) -> BatchShape:
    """Return the shape of a batch of images with these heights and widths."""
    pixels = max(height for height, _ in sizes_hw) * max(width for _, width in sizes_hw)
    return BatchShape(len(sizes_hw), pixels, is_padded=len(set(sizes_hw)) > 1)


@dataclass(frozen=True)
class CacheOptions:
    """Options of the cache.

    Attributes:
        gigabytes: --cache_gb, None for the free memory.
        dtype: --cache_dtype, None for bfloat16 only if full precision does not fit.
        device: --cache_device, None for --device, or RAM if that is a GPU with too little memory.
        searched: the option that selects the search images, for messages.
    """

    gigabytes: float | None = None
    dtype: str | None = None
    device: torch.device | None = None
    searched: str = "--search_images all"


@dataclass(frozen=True)
class Storage:
    """Device, precision and size of a cache.

    Attributes:
        device: of features and states.
        dtype: of features; None keeps the dtype in which they are computed.
        max_bytes: upper bound for features and states.
        state_bytes: part of `max_bytes` reserved for states (half of it at most).
    """

    device: torch.device = CPU
    dtype: torch.dtype | None = None
    max_bytes: float = math.inf
    state_bytes: float = 0.0


# Called with the features of the first batch and the peak bytes of computing them.
Plan = Callable[[Features | BackboneState, int], Storage]


@dataclass(frozen=True)
class Need:
    """Bytes that a complete cache takes in one process.

    Attributes:
        features: of all batches, in the dtype in which they are computed.
        halved: of all batches in bfloat16.
        states: most bytes of the batches whose states are kept.
    """

    features: float
    halved: float
    states: float

    def total(self, dtype: torch.dtype | None) -> float:
        """Return the bytes of features in this precision, and of states."""
        return self.states + (self.features if dtype is None else self.halved)


@dataclass(frozen=True)
class Work:
    """Peak bytes that a search takes besides its cache.

    Attributes:
        passes: on the device, for passes through the network, the calibration and the fits.
        reading: in RAM, for prefetched images.
        evaluation: in RAM, for the boxes of all images on which mAP is measured.
        fits: in RAM, see `FitMemory`.
    """

    passes: float
    reading: float
    evaluation: float
    fits: float = 0.0


@dataclass(frozen=True)
class Uses:
    """How a search uses the batches of this process.

    Attributes:
        shapes: of all batches, in order.
        kept_batches: batches whose states are kept.
        calibrated_batches: batches for gradients; none without calibration.
        images_at_once: most images scored in one pass.
        reading, evaluation: see `Work`.
        images, calibrated_images: numbers of images and of calibration images of all processes.
        fits_layers: whether calibration also measures gradients at the modules' outputs and fits weights.
        fitting_processes: those that the fits of all modules are divided among.
        amp, eval_amp: precision of passes with gradients, and of those without.
    """

    shapes: Sequence[BatchShape]
    kept_batches: Collection[int]
    calibrated_batches: Collection[int]
    images_at_once: int
    reading: float
    evaluation: float
    images: int
    calibrated_images: int
    fits_layers: bool = False
    fitting_processes: int = 1
    amp: str = "off"
    eval_amp: str = "off"


@dataclass(frozen=True)
class _BlockInput:
    """Bytes of the state at the input of a residual block for one image, and rows and columns of its map."""

    nbytes: int
    maps_hw: tuple[int, int]


class CachePlanner:
    """Chooses a `Storage` from the features of the first batch.

    Attributes:
        notices: messages about the choice.
        need, work, free: what it was made from; `free` are the free bytes of each device that may hold the cache.
        fits: whether all features and states fit.
    """

    need: Need
    work: Work
    free: Mapping[torch.device, float]
    fits: bool

    def __init__(self, model: Detector, uses: Uses, options: CacheOptions, device: torch.device) -> None:
        """Measure nothing yet."""
        self._model, self._uses, self._options, self._device = model, uses, options, device
        self.notices: list[Notice] = []

    def __call__(self, features: Features | BackboneState, front_bytes: int) -> Storage:
        """Choose the storage and log messages about it; see `choose`."""
        storage = self.choose(features, front_bytes)
        show(self.notices)
        return storage

    def choose(self, features: Features | BackboneState, front_bytes: int) -> Storage:
        """Choose the storage; all processes use the same precision.

        Args:
            features: of the first batch.
            front_bytes: peak bytes of computing them.

        Raises:
            UserError: the search needs too much memory even without a cache; raised in all processes.
        """
        try:
            need, work = self.measure(features, front_bytes)
        except torch.OutOfMemoryError:
            problem = (
                f"{self._device}: found too little memory for one image of the search, expected a smaller "
                "--image_size, --amp or --cache_device cpu"
            )
            distributed.gather_objects((0, problem))  # the other processes raise it below
            raise UserError(problem) from None
        free = {device: free_bytes(device) for device in self._devices()}
        limits = {device: self._limit(device, free[device], work) for device in free}
        choices = [(device, dtype) for dtype in self._dtypes(features) for device in free]
        fitting = [n for n, (device, dtype) in enumerate(choices) if need.total(dtype) <= limits[device]]
        found = distributed.gather_objects((min(fitting, default=len(choices)), self._problem(work, free)))
        if problems := [problem for _, problem in found if problem]:
            raise UserError(problems[0])
        choice = max(number for number, _ in found)
        fits = choice < len(choices)
        device = choices[choice][0] if fits else max(limits, key=limits.__getitem__)
        # Without memory for a cache, bfloat16 gains nothing.
        dtype = choices[choice][1] if fits else choices[-1 if limits[device] > 0 else 0][1]
        storage = Storage(device, dtype, limits[device], need.states)
        self.need, self.work, self.free, self.fits = need, work, free, fits
        if distributed.is_main():
            self.notices = self._notices(need, storage, free[device], fits)
        return storage

    @torch.no_grad()
    def measure(self, features: Features | BackboneState, front_bytes: int) -> tuple[Need, Work]:
        """Measure the memory of cache and passes with one image of the first batch."""
        uses, model = self._uses, self._model
        one = features.map(lambda tensor: tensor[:1].clone())
        with autocast(self._device, uses.eval_amp), PeakMemory() as forward:
            state, inputs = self._run(model.start(one))
            model.outputs(model.run_steps(state, model.step_names[-1]))
        backward = self._backward_bytes(one) if uses.calibrated_batches else 0
        backbone_bytes = max((block.nbytes for block in inputs.values()), default=0)
        first = uses.shapes[0]
        scales = [shape.pixels / first.pixels for shape in uses.shapes]
        images = [shape.images for shape in uses.shapes]
        pixels = sum(n * scale for n, scale in zip(images, scales, strict=True))
        halved = one.content.numel() * torch.bfloat16.itemsize + one.nbytes - one.content.nbytes
        # Calibration keeps the states of the unpruned backbone beside those of the pruned one.
        in_backbone = backbone_bytes * sum(
            shape.images * scale * (1 + (batch in uses.calibrated_batches))
            for batch, (shape, scale) in enumerate(zip(uses.shapes, scales, strict=True))
            if batch in uses.kept_batches
        )
        need = Need(pixels * one.nbytes, pixels * halved, max(self._state_bytes(state, scales), in_backbone))

        calibrated = sum(images[batch] * scales[batch] for batch in uses.calibrated_batches)
        passes = max(
            front_bytes * max(n * scale for n, scale in zip(images, scales, strict=True)) / first.images,
            forward.peak_bytes * max(max(n, uses.images_at_once) * s for n, s in zip(images, scales, strict=True)),
            backward * max(scales),
        )
        passes += CALIBRATION_SHARE * calibrated * state.memory.numel() * torch.float32.itemsize
        if not uses.fits_layers or not uses.calibrated_batches:
            return need, Work(passes, uses.reading, uses.evaluation)
        fits = fit_memory(
            model, self._scope(one), {name: block.maps_hw for name, block in inputs.items()},
            [(images[batch], scales[batch]) for batch in uses.calibrated_batches], uses.calibrated_images,
            uses.fitting_processes, sums_on_device=self._device.type != "cpu",
        )  # fmt: skip
        return need, Work(passes + fits.device, uses.reading, uses.evaluation, fits.ram)

    def _scope(self, start: Features | BackboneState) -> str:
        return "detector" if isinstance(start, BackboneState) else "transformer"

    def _run(self, state: BackboneState | DetectorState) -> tuple[DetectorState, dict[str, _BlockInput]]:
        """Run one image up to the last step; return its state there, and what each residual block has as input."""
        names = self._model.steps_in("detector" if isinstance(state, BackboneState) else "transformer")
        inputs = {}
        for name, following in itertools.pairwise(names):
            if isinstance(state, BackboneState):
                rows, columns = state.maps.shape[-2:]
                inputs[name] = _BlockInput(state.nbytes, (rows, columns))
            state = self._model.run_steps(state, name, following)
        assert isinstance(state, DetectorState)
        return state, inputs

    def _state_bytes(self, state: DetectorState, scales: Sequence[float]) -> float:
        """Return the bytes of all kept states at the last step's input, from the state of one image (`state`)."""
        on_pixels = storage_bytes(t for t in (state.memory, state.memory_mask) if t is not None)
        positions = storage_bytes([state.memory_pos])
        on_queries = storage_bytes(state.tensors()) - on_pixels - positions
        total = 0.0
        for batch in self._uses.kept_batches:
            shape, scale = self._uses.shapes[batch], scales[batch]
            total += shape.images * (on_queries + scale * on_pixels)
            total += positions * scale * (shape.images if shape.is_padded else 1)  # images of equal size share them
        return total

    def _backward_bytes(self, one: Features | BackboneState) -> int:
        """Return the peak bytes of a forward and backward pass of one image."""
        modules = self._model.prunable_modules(self._scope(one)).values() if self._uses.fits_layers else ()
        with torch.enable_grad(), kept_outputs(self._model, modules) as kept, PeakMemory() as memory:
            with autocast(self._device, self._uses.amp):
                leaf = one.content.float().requires_grad_()
                start = one.map(lambda tensor: leaf if tensor is one.content else tensor)
                outputs = self._model.outputs(self._model.run_steps(self._model.start(start)))
            layers = [outputs, *outputs["aux_outputs"]]
            loss = sum(layer[key].float().sum() for layer in layers for key in ("pred_logits", "pred_boxes"))
            torch.autograd.grad(loss, [leaf, *kept.values()])
        return memory.peak_bytes

    def _devices(self) -> list[torch.device]:
        """Return the allowed devices of the cache, the preferred one first."""
        if self._device.type == "cpu" or self._options.device == CPU:
            return [CPU]
        return [self._device, CPU]

    def _dtypes(self, features: Features | BackboneState) -> list[torch.dtype | None]:
        """Return the allowed precisions, the preferred one first."""
        if self._options.dtype is not None:
            return [torch.bfloat16 if self._options.dtype == "bfloat16" else None]
        return [None] if features.content.itemsize <= torch.bfloat16.itemsize else [None, torch.bfloat16]

    def _limit(self, device: torch.device, free: float, work: Work) -> float:
        """Return the most bytes that the cache may take on a device."""
        asked = math.inf if self._options.gigabytes is None else GB * self._options.gigabytes
        if device.type == "cpu" and asked < math.inf:
            return asked
        return min(asked, max(0.0, USABLE_SHARE * free - self._beside(device, work)))

    def _beside(self, device: torch.device, work: Work) -> float:
        """Return the bytes that the search takes on a device besides its cache."""
        passes = work.passes if device.type == self._device.type else 0.0
        return passes + (work.reading + work.evaluation + work.fits if device.type == "cpu" else 0.0)

    def _problem(self, work: Work, free: Mapping[torch.device, float]) -> str | None:
        """Return why the search cannot run even without a cache, or None; --cache_gb skips this check."""
        beside = self._beside(CPU, work)
        if self._options.gigabytes is not None or beside <= USABLE_SHARE * free[CPU]:
            return None
        passes = f"{work.passes / GB:.1f} GB for passes through the network, " if self._device.type == "cpu" else ""
        passes += f"{work.fits / GB:.1f} GB for fits, " if work.fits else ""
        return (
            f"{self._options.searched}: found {free[CPU] / GB:.1f} GB of free RAM{_each()}, expected at least "
            f"{beside / USABLE_SHARE / GB:.1f} GB: {work.evaluation / GB:.1f} GB for mAP of {self._uses.images:,} "
            f"images, {passes}{work.reading / GB:.1f} GB for images read ahead, and a margin; use fewer "
            "--search_images, a smaller --batch_size or --images_at_once, or skip this check with --cache_gb"
        )

    def _notices(self, need: Need, storage: Storage, free: float, fits: bool) -> list[Notice]:
        """Return messages if the cache is not on the preferred device in full precision."""
        place = "RAM" if storage.device.type == "cpu" else str(storage.device)
        whole = (
            f"{self._options.searched}: features and states need {need.total(None) / GB:.1f} GB{_each()}, and "
            f"{storage.max_bytes / GB:.1f} of {free / GB:.1f} GB of free {place} may be used (--cache_gb)"
        )
        is_halved = storage.dtype is not None
        halved = f" in bfloat16 ({need.total(storage.dtype) / GB:.1f} GB)" if is_halved else ""
        if not fits:
            features = need.halved if is_halved else need.features
            share = (storage.max_bytes - min(need.states, storage.max_bytes / 2)) / features
            kept = (
                f"features of about {100 * share:.0f} % of the images" if share < 1 else "all features, not all states,"
            )
            return [
                (
                    logging.WARNING,
                    f"{whole}: {kept} are kept{halved}, the rest is recomputed each time, which is slow; fewer "
                    "--search_images or a larger --cache_gb avoid it",
                )
            ]
        if is_halved and self._options.dtype is None:
            return [(logging.WARNING, f"{whole}: features are kept{halved}; fewer --search_images avoid it")]
        if storage.device.type != self._device.type and self._options.device is None:
            return [(logging.INFO, f"{whole}: they are kept there because they do not fit on {self._device}")]
        return []


def _each() -> str:
    """Return the suffix for a figure of one process."""
    processes = distributed.world_size()
    return f" for each of {processes} processes" if processes > 1 else ""
