"""Check that an exported detector gives the outputs of the original, for several image and batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.padding import PaddedImages, pad_images
from models.post_process import PostProcess
from util.phases import CHECKS, phase

TOLERANCE = 1e-3
BATCH_SIZES = (1, 3)
# Of the input's height and width, images of a batch with a mask; the second leaves a row and a column of any map empty.
FILLED = ((1, 1), (1 / 2, 2 / 5), (4 / 5, 6 / 7), (3 / 5, 5 / 7))
# Closer scores may be in either order.
SCORE_GAP = 1e-5

# Maps inputs by name to outputs by name.
Runner = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A batch: height and width in pixels, images, and greatest difference of any output (inf: not finite)."""

    size_hw: tuple[int, int]
    batch_size: int
    difference: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


def check_export(
    run: Runner,
    model: nn.Module,
    postprocess: PostProcess,
    sizes_hw: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    with_mask: bool,
    tolerance: float = TOLERANCE,
    as_scores: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> list[Case]:
    """Compare an exported detector with the original.

    Args:
        run: the exported detector; takes `images` and, `with_mask`, `mask`, returns `pred_logits`, `pred_boxes` and,
        if it selects detections, `scores`, `labels`, `boxes`.
        model: the detector in eval mode.
        postprocess: reference for `scores`, `labels` and `boxes`, applied to the exported logits and boxes.
        sizes_hw: height and width of the inputs in pixels, each checked with every one of `batch_sizes`. With a
        mask, a single image that fills the input is compared with the detector without a mask. Smaller images, padded
        at the right and bottom, are compared with the detector on the same input: one alone, and those after the
        first in larger batches.
        tolerance: greatest difference of a case that passes.
        as_scores: compare the sigmoid of logits.
        progress: called after each case.
    """
    cases = []
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes_hw:
        for batch_size in batch_sizes:
            differences = []
            for filled in filled_by_images(batch_size, with_mask):
                images = [torch.randn(3, int(h * height), int(w * width), generator=generator) for h, w in filled]
                with phase(CHECKS, len(images)):
                    differences += _differences(run, model, postprocess, images, (height, width), with_mask, as_scores)
            cases.append(Case((height, width), batch_size, max(differences), tolerance))
            progress()
    return cases


def filled_by_images(batch_size: int, with_mask: bool) -> list[list[tuple[float, float]]]:
    """Return, for the batches to check, which share of the input's height and width each image fills."""
    batches = [[FILLED[i % len(FILLED)] if with_mask else FILLED[0] for i in range(batch_size)]]
    if with_mask and batch_size == 1:
        batches.append([FILLED[1]])
    return batches


@torch.no_grad()
def _differences(
    run: Runner, model: nn.Module, postprocess: PostProcess, images: list[Tensor], size_hw: tuple[int, int],
    with_mask: bool, as_scores: bool,
) -> list[float]:  # fmt: skip
    """Return the differences of each output, for images at the upper left of inputs of that size."""
    batch, padding, _ = pad_images([*images, torch.zeros(3, *size_hw)])  # the last one sets the size
    batch = batch[:-1]
    mask = torch.zeros(len(images), *size_hw, dtype=torch.bool) if padding is None else padding[:-1]
    found = run({"images": batch, **({"mask": mask} if with_mask else {})})
    expected = model(images if padding is None else PaddedImages(batch, mask))
    logits, scores = found["pred_logits"], expected["pred_logits"]
    if as_scores:
        logits, scores = logits.sigmoid(), scores.sigmoid()
    differences = [
        greatest_difference(logits, scores),
        greatest_difference(found["pred_boxes"], expected["pred_boxes"]),
    ]
    return [*differences, *([_difference_of_detections(found, postprocess)] if "scores" in found else [])]


def greatest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the greatest absolute difference; infinite if shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found.double() - expected.double()).abs()
    return float(difference.max()) if difference.numel() and difference.isfinite().all() else math.inf


def _difference_of_detections(found: dict[str, Tensor], postprocess: PostProcess) -> float:
    """Return the greatest difference of selected detections from PyTorch's, for the same logits and boxes."""
    scores, labels, boxes = postprocess.select(found["pred_logits"], found["pred_boxes"])
    difference = greatest_difference(found["scores"], scores)
    if found["labels"].shape != labels.shape or found["boxes"].shape != boxes.shape:
        return math.inf
    gaps = scores[:, :-1] - scores[:, 1:] > SCORE_GAP
    before = torch.cat((torch.ones_like(gaps[:, :1]), gaps), dim=1)
    behind = torch.cat((gaps, torch.zeros_like(gaps[:, :1])), dim=1)  # the score after the last is unknown
    alone = before & behind
    if not torch.equal(found["labels"][alone], labels[alone]):
        return math.inf
    return max(difference, greatest_difference(found["boxes"][alone], boxes[alone]) if alone.any() else 0.0)
