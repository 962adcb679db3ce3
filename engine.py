"""Training and evaluation loops for detectors of any width and for the searches."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from datasets.coco_eval import GroundTruth, coco_stats, to_detections
from models.criterion import Criterion
from models.distillation import Distillation
from util import distributed
from util.batch_record import BatchRecord, bad_gradient
from util.ema import WeightAverage
from util.errors import NonFiniteLossError, UserError
from util.logging import bar_off
from util.phases import MAP, phase

LEAST_SCALE = 2.0**-30  # of the fp16 loss; if the scale falls below it, the gradient is NaN and not an overflow
USED_OF_TARGETS = ("labels", "boxes")  # by the losses
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batches(Protocol):
    """Batches (images, targets) of one pass.

    Their length may be more than their number if `accumulate` divides both: the last step must have all its batches.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]: ...


@dataclass
class EvalResult:
    """Result of `evaluate`.

    Attributes:
        stats: the twelve COCO metrics, each in [0, 1], or -1 if undefined.
        losses: mean over images of each loss and of `loss`, the weighted sum; empty without a criterion.
        detections: N x 7 array of (image_id, x, y, w, h, score, category_id), boxes in pixels of the original image.
        image_ids: the evaluated images, sorted.
        stats_by_layer: `stats` after each decoder layer, first to last; empty unless asked for.
    """

    stats: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)
    detections: np.ndarray = field(default_factory=lambda: np.zeros((0, 7)))
    image_ids: list[int] = field(default_factory=list)
    stats_by_layer: list[dict[str, float]] = field(default_factory=list)


class Means:
    """Running weighted means of a fixed set of named scalars, kept on the device until they are read."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._weight = 0

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add the scalar tensors of one batch, with this weight."""
        self._names = self._names or sorted(values)
        stacked = weight * torch.stack([values[name] for name in self._names]).double()
        self._sums = stacked if self._sums is None else self._sums + stacked
        self._weight += weight

    def read(self) -> dict[str, float]:
        """Return the mean of each name over the batches of all processes."""
        if self._sums is None:
            return {}
        sums = distributed.average(dict(zip(self._names, self._sums, strict=True)))
        weight = distributed.average({"weight": self._sums.new_full((), self._weight)})["weight"]
        return dict(zip(sums, (torch.stack([*sums.values()]) / weight).cpu().tolist(), strict=True))


def move_to(value: Any, device: torch.device) -> Any:
    """Move the tensors inside lists, tuples and dicts to `device`; other values are unchanged."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def targets_on(targets: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """Return what the losses need of the targets of a batch on `device`.

    A small copy to a GPU costs as much as a large one, so those of all images are made at once.
    """
    moved: list[dict[str, Tensor]] = [{} for _ in targets]
    for name in (name for name in USED_OF_TARGETS if name in targets[0]):
        values = torch.cat([target[name] for target in targets]).to(device, non_blocking=True)
        for target, value in zip(moved, values.split([len(target[name]) for target in targets]), strict=True):
            target[name] = value
    return moved


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Return the autocast context of a forward pass; `amp` is off, bf16 or fp16."""
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    epoch: int = 0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip_max_norm: float = 0.0,
    amp: str = "off",
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    weight_average: WeightAverage | None = None,
    distillation: Distillation | None = None,
    progress: bool = True,
    on_batch: Callable[[Mapping[str, Tensor], int, Sequence[float]], None] = lambda losses, images, rates: None,
) -> dict[str, float]:
    """Train `model`, which may be wrapped in DistributedDataParallel, for one epoch.

    Returns the mean over the epoch and all processes of each loss and of `loss`, their weighted sum. A step's gradient
    is the mean over `accumulate` batches (fewer in an epoch's last step). Each batch normalises its losses by its own
    boxes, so this equals one larger batch only if all batches have equally many boxes.
    On a GPU the CPU waits once a batch, for the costs of matching, and checks losses and gradients one batch later. A
    fused optimizer leaves out a bad step by itself; others wait for the norm before each step, and fp16 for the scale.

    Args:
        scheduler: stepped after each optimizer step, even if fp16 skips that step.
        clip_max_norm: largest norm of the gradient, 0 for no clipping.
        amp: off, bf16 or fp16; fp16 needs `scaler`.
        distillation: adds losses towards a teacher's outputs on the same images.
        on_batch: called for each batch with the mean losses of all processes, its number of images, and the rates.

    Raises:
        NonFiniteLossError: a loss or the gradient is not finite; raised in all processes; the weights are unchanged.
    """
    model.train()
    criterion.train()
    optimizer.zero_grad(set_to_none=True)
    pending: list[dict[str, Tensor]] = []  # targets of the batches of the next optimizer step
    bar = tqdm(loader, desc=f"epoch {epoch}", disable=bar_off(progress), leave=False)
    reports = _LateReports(bar, on_batch)
    for number, (images, targets) in enumerate(bar):
        pending += targets
        moved = move_to(images, device), targets_on(targets, device)
        in_step = min(accumulate, len(loader) - number // accumulate * accumulate)  # batches
        stepping = (number + 1) % accumulate == 0 or number + 1 == len(loader)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not stepping else nullcontext():
            loss, own = _losses(model, criterion, *moved, autocast(device, amp), distillation)
            place = f"epoch {epoch}, step {number + 1} of {len(loader)}"
            batch = BatchRecord(own, targets, [group["lr"] for group in optimizer.param_groups], place)
            reports.report_last(batch)
            (loss / in_step if scaler is None else scaler.scale(loss / in_step)).backward()
        if stepping:
            _optimizer_step(model, optimizer, scheduler, clip_max_norm, scaler, weight_average, batch, pending)
            pending = []
        else:
            batch.start_copy()
    reports.report_last()
    return reports.means.read()


class _LateReports:
    """Checks, counts and reports each batch of an epoch after the next one was matched; see `train_one_epoch`."""

    def __init__(self, bar: tqdm, on_batch: Callable[[Mapping[str, Tensor], int, Sequence[float]], None]) -> None:
        self.means, self._bar, self._on_batch = Means(), bar, on_batch
        self._last: BatchRecord | None = None

    def report_last(self, following: BatchRecord | None = None) -> None:
        """Report the last batch, if there is one; `following` is the last one from now on."""
        batch, self._last = self._last, following
        if batch is not None:
            self._bar.set_postfix(loss=f"{batch.check():.3f}", lr=f"{batch.rates[0]:.1e}", refresh=False)
            self.means.add(batch.losses)
            self._on_batch(batch.losses, len(batch.targets), batch.rates)


@torch.no_grad()
def evaluate(
    predict: Callable[[Any], dict[str, Any]],
    postprocess: Callable[[dict[str, Any], Tensor], Sequence[dict[str, Tensor]]],
    loader: Iterable[tuple[Any, list[dict[str, Tensor]]]],
    ground_truth: GroundTruth,
    *,
    device: torch.device,
    criterion: Criterion | None = None,
    amp: str = "off",
    backend: str | None = None,
    progress: bool = True,
    by_layer: bool = False,
) -> EvalResult:
    """Compute the twelve COCO metrics of `predict` over the images of `loader`.

    With several processes each evaluates its own part. The parts are gathered, duplicate images count once, and every
    process gets the same result.

    Args:
        predict: maps one batch of inputs to the detector's outputs; a module is in eval mode meanwhile.
        postprocess: maps (outputs, B x 2 original image sizes (h, w)) to scores, labels and boxes xyxy.
        loader: yields (inputs, targets); inputs are tensors on any device, or what else `predict` takes, on `device`.
        ground_truth: annotations; only those of the evaluated images count.
        criterion: if given, its losses are averaged too.
        backend: evaluator of `coco_stats`; None for its default.
        by_layer: also compute the metrics of the outputs after each earlier decoder layer (`aux_outputs`).

    Raises:
        NonFiniteLossError: a score or a box is not finite; raised in all processes.
        UserError: there are no images, but metrics `by_layer` are asked for.
    """
    rows: dict[int, list[np.ndarray]] = {}  # of each image, the detections after each layer
    means = Means()
    batches = tqdm(loader, desc="evaluate", disable=bar_off(progress), leave=False)
    with eval_mode(predict), eval_mode(criterion):
        for inputs, targets in batches:
            sizes = torch.stack([target["orig_size"] for target in targets])
            outputs, results = detect(predict, postprocess, inputs, sizes, device=device, amp=amp)
            if criterion is not None:
                losses = criterion(outputs, targets_on(targets, device))
                means.add({**losses, "loss": criterion.weighted_sum(losses)}, weight=len(targets))
            earlier = [postprocess(layer, sizes.to(device)) for layer in outputs["aux_outputs"]] if by_layer else []
            for target, *of_layers in zip(targets, *earlier, results, strict=True):
                image_id = int(target["image_id"])
                rows[image_id] = [to_detections(image_id, result) for result in of_layers]
    merged: dict[int, list[np.ndarray]] = {}
    for part in distributed.gather_objects(rows):
        merged.update(part)
    image_ids = sorted(merged)
    if by_layer and not image_ids:
        raise UserError("--ap_by_layer: found no images, expected at least one")
    layers = [_joined(of_layer) for of_layer in zip(*(merged[i] for i in image_ids), strict=True)] or [np.zeros((0, 7))]
    with phase(MAP, len(image_ids) * len(layers)):
        stats = [coco_stats(ground_truth, found, image_ids=image_ids, backend=backend) for found in layers]
    return EvalResult(stats[-1], means.read(), layers[-1], image_ids, stats if by_layer else [])


def _joined(detections_of_images: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the detections of all images.

    Raises:
        NonFiniteLossError: a score or a box is not finite.
    """
    detections = np.concatenate(detections_of_images)
    if not np.isfinite(detections).all():
        bad = sorted({int(row[0]) for row in detections[~np.isfinite(detections).all(axis=1)]})
        raise NonFiniteLossError(f"evaluation: scores or boxes are not finite, on the images {bad}")
    return detections


@torch.no_grad()
def detect(
    predict: Callable[[Any], dict[str, Any]],
    postprocess: Callable[[dict[str, Any], Tensor], Sequence[dict[str, Tensor]]],
    inputs: Any,
    sizes_hw: Tensor,
    *,
    device: torch.device,
    amp: str = "off",
) -> tuple[dict[str, Any], Sequence[dict[str, Tensor]]]:
    """Return the outputs of one batch in float32 and the detections of each image; arguments as for `evaluate`."""
    with autocast(device, amp):
        outputs = predict(move_to(inputs, device))
    outputs = _to_float32(outputs)
    return outputs, postprocess(outputs, sizes_hw.to(device))


def to_coco_results(detections: np.ndarray) -> list[dict[str, Any]]:
    """Convert detections (N x 7, see `EvalResult`) to the entries of a COCO results file."""
    return [
        {"image_id": int(row[0]), "category_id": int(row[6]), "bbox": row[1:5].tolist(), "score": float(row[5])}
        for row in detections
    ]


def _losses(
    model: nn.Module,
    criterion: Criterion,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    precision: contextlib.AbstractContextManager,
    distillation: Distillation | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch for the backward pass, and all losses of this process with it as `loss`."""
    with precision:
        queries = None if distillation is None else distillation.draw(targets)
        inputs = images if distillation is None else distillation.begin(images)
        outputs = model(inputs, targets if queries is None else queries)
        lesson = None if distillation is None else distillation.teach(inputs, queries)
    outputs = _to_float32(outputs)
    losses = criterion(outputs, targets)
    loss = criterion.weighted_sum(losses)
    if distillation is not None and lesson is not None:
        distilled = distillation(outputs, lesson)
        loss = loss + distillation.weighted_sum(distilled)
        losses = losses | distilled
    return loss, {**losses, "loss": loss}


def _optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    clip_max_norm: float,
    scaler: torch.amp.GradScaler | None,
    weight_average: WeightAverage | None,
    batch: BatchRecord,
    targets: Sequence[Mapping[str, Tensor]],
) -> None:
    """Clip the gradients, step the optimizer and clear them; update the weight average and the learning rates.

    A fused optimizer leaves the weights as they are if the loss or the gradient is not finite, which `batch.check`
    finds later. With a scaler, an overflow lowers the scale and skips the step and the weight average.

    Args:
        batch: the step's last batch; its copy is started.
        targets: of the images in all batches of the step.

    Raises:
        NonFiniteLossError: the loss or the gradient is not finite (with a scaler: at any scale); the weights are
            unchanged.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(parameter.grad for parameter in trained if parameter.grad is not None)
    batch.start_copy(norm if scaler is None else None, targets)
    if clip_max_norm > 0:
        nn.utils.clip_grads_with_norm_(trained, clip_max_norm, norm)
    stepped = True
    if scaler is not None:
        batch.check()  # reading the scale waits as long
        stepped = _scaled_step(optimizer, scaler, batch.place, targets)
    elif optimizer.defaults.get("fused"):
        finite = norm.isfinite() & batch.losses["loss"].isfinite()
        optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        batch.check()
        optimizer.step()
    if stepped and weight_average is not None:
        weight_average.update()
    if scheduler is not None:
        scheduler.step()
    optimizer.zero_grad(set_to_none=True)


def _scaled_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    place: str,
    targets: Sequence[Mapping[str, Tensor]],
) -> bool:
    """Step the optimizer and adjust the scale; return whether the step was taken."""
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    scale = scaler.get_scale()
    if scale < LEAST_SCALE:
        raise bad_gradient(place, targets)
    return scale >= before


def _to_float32(value: Any) -> Any:
    """Convert floating tensors inside dicts and lists to float32, in which losses and boxes are computed."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)


@contextlib.contextmanager
def eval_mode(module: Any) -> Iterator[None]:
    """Put a module in eval mode inside the context, then restore its mode; other callables are unchanged."""
    if not isinstance(module, nn.Module):
        yield
        return
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
