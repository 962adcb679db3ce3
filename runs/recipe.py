"""The recipe for fine-tuning a search's output: values for the options that were not typed."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from datasets.annotations import load_annotations
from datasets.coco import split_of
from runs.config import TrainingOptions
from runs.past_training import PastTraining
from util import distributed
from util.logging import table
from weights.class_heads import class_difference
from weights.formats import Checkpoint
from weights.teacher import teacher_of

EPOCHS = 12
BACKBONE_SHARE = 0.1  # of the learning rate where the backbone's is not known or 0, as in DETR
DN_DETR = PastTraining(lr=1e-4, lr_backbone=1e-5, batch=16)  # where a detector's own training is not known
WARMUP_SHARE, MOST_WARMUP = 0.02, 500  # of the optimizer steps; steps
EMA_SHARE, MOST_EMA_DECAY = 0.02, 0.9999  # of the optimizer steps, over which weights are averaged


@dataclass(frozen=True)
class Part:
    """One value of the recipe: the option's name, its value, and why it has this value."""

    name: str
    value: Any
    reason: str


def recipe_of(options: TrainingOptions, typed: Collection[str], checkpoint: Checkpoint) -> list[Part]:
    """Return the parts of the recipe for a checkpoint, without those whose options were typed; none but for a search.

    Args:
        options: completed from the checkpoint, and with the classes of the annotations.
        typed: names of the typed options.

    Raises:
        UserError: the training annotations cannot be read.
    """
    if not checkpoint.is_search or options.run.eval:
        return []
    first = [part for part in _schedule(typed) if part.name not in typed]
    options = options.with_values({part.name: part.value for part in first})
    rest = [
        *_rates(options, typed, PastTraining.of(checkpoint.arguments)),
        _precision(distributed.choose_device(options.run.device)),
    ]
    if "distill" not in typed:
        rest += _teacher(checkpoint, options)
    return [*first, *(part for part in rest if part.name not in typed)]


def recipe_table(parts: list[Part]) -> str:
    """Return the recipe as a text table."""
    rows = [(f"--{part.name}", _as_typed(part.value), part.reason) for part in parts]
    return table(["recipe", "", "because"], rows)


def _as_typed(value: Any) -> str:
    """Return a value as one types it: 2.5e-05, which a table of figures would round to 0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _schedule(typed: Collection[str]) -> list[Part]:
    parts = [Part("epochs", EPOCHS, "the weights of the search are near an optimum")]
    if "lr_drop" not in typed:
        parts.append(Part("lr_schedule", "cosine", "from the full rate to 0, by optimizer steps"))
    parts.append(Part("weight_decay_on", "matrices", "not on norms, biases, embeddings and PReLU"))
    return parts


def _rates(options: TrainingOptions, typed: Collection[str], past: PastTraining | None) -> list[Part]:
    """Return learning rates, warm-up and averaging, which follow the batch size and the length of the run.

    A run starts at the rate that the dense detector's training started at, and falls to 0 (learning rate rewinding:
    Renda, Frankle and Carbin, arXiv 2003.02389).
    """
    training = options.training
    images = len(load_annotations(split_of(options.data, "train2017").annotation_file).image_ids)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = options.data.batch_size * training.accumulate * processes
    batches = math.ceil(math.ceil(images / processes) / options.data.batch_size)
    steps = math.ceil(batches / training.accumulate) * training.epochs
    source = "as in DN-DETR" if past is None else "as in the training of the dense detector"
    past = past or DN_DETR
    scaled = "" if past.batch is None else f", times the root of {batch} / {past.batch} images a step"
    lr = training.lr if "lr" in typed else _rounded(past.lr * math.sqrt(batch / (past.batch or batch)))
    backbone_share = float(f"{(past.lr_backbone or BACKBONE_SHARE * past.lr) / past.lr:.2g}")
    decay = round(min(MOST_EMA_DECAY, max(0.0, 1 - 1 / (EMA_SHARE * steps))), 5)
    return [
        Part("lr", lr, f"{past.lr:g}, {source}{scaled}"),
        Part("lr_backbone", _rounded(backbone_share * lr), f"{backbone_share:g} of the learning rate"),
        Part(
            "warmup_iters", min(MOST_WARMUP, round(WARMUP_SHARE * steps)), f"{100 * WARMUP_SHARE:g} % of {steps} steps"
        ),
        Part("ema_decay", decay, f"averages over {100 * EMA_SHARE:g} % of {steps} steps"),
    ]


def _precision(device: torch.device) -> Part:
    if device.type != "cuda":
        return Part("amp", "off", "on a CPU")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Part("amp", "bf16", "mixed precision on a GPU")
    return Part("amp", "fp16", "mixed precision on a GPU without bfloat16")


def _teacher(checkpoint: Checkpoint, options: TrainingOptions) -> list[Part]:
    if class_difference(checkpoint, options.detector.num_classes, options.detector.categories or {}):
        return []  # the teacher does not know the new classes
    teacher = teacher_of(checkpoint)
    return [] if teacher is None else [Part("distill", teacher, "the detector that the search pruned")]


def _rounded(value: float) -> float:
    """Round to two digits, as people write rates."""
    return float(f"{value:.1e}")
