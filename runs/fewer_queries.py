"""Keep fewer queries of a detector before a run (`--keep_queries`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import Subset

import engine
from datasets.coco import build_dataset, build_loader
from datasets.coco_eval import GroundTruth, evaluator_name, shown
from models.post_process import PostProcess
from pruning.queries import QUERY_IMAGES, choose_queries
from runs.config import SearchOptions, TrainingOptions
from util import distributed
from util.errors import UserError
from util.logging import Notice
from weights.class_heads import NewParts
from weights.formats import Checkpoint

Options = TypeVar("Options", TrainingOptions, SearchOptions)


@dataclass(frozen=True)
class KeptQueries:
    """The queries that a run keeps.

    Attributes:
        indices: ascending, of the checkpoint's queries.
        ap_before: AP in [0, 1] with all queries, on the split that the run measures.
        notice: log line about both.
    """

    indices: list[int]
    ap_before: float
    notice: Notice


def check_keep_queries(
    options: TrainingOptions | SearchOptions, checkpoint: Checkpoint | None, *, continuing: bool = False
) -> None:
    """Raise a `UserError` unless the checkpoint has at least `--keep_queries` queries and its training may change."""
    count, found = options.run.keep_queries, options.detector.num_queries
    if count is None:
        return
    if checkpoint is None:
        raise UserError("--keep_queries: found no --resume, expected the checkpoint whose queries to keep")
    if count > found:
        raise UserError(f"--keep_queries {count}: {checkpoint.path} has {found} queries, expected 1 to {found}")
    if continuing and count < found:
        raise UserError(
            f"--keep_queries {count}: {checkpoint.path} holds a training run with {found} queries, which cannot "
            "continue with fewer; expected --start_fresh to train its weights"
        )


def keep_best_queries(
    options: Options,
    detector: tuple,
    device: torch.device,
    *,
    chosen_on: str,
    measured_on: str,
    amp: str,
    num_images: int | None = None,
    new_parts: NewParts | None = None,
) -> tuple[Options, KeptQueries | None]:
    """Keep the `--keep_queries` queries that find most; return the options of the smaller detector, and a record.

    The model is changed in place. Without the option, or if it has no more queries, nothing is done.

    Args:
        detector: model, criterion and postprocessors, with the checkpoint's weights.
        chosen_on: split whose first images choose the queries.
        measured_on: split that measures AP.
        amp: off, bf16 or fp16, for all passes.
        num_images: measure AP on the first images only; None for all.
        new_parts: weights that were not loaded.

    Raises:
        UserError: not all weights are the checkpoint's, or the images cannot be read or have no objects.
    """
    count, model, postprocess = options.run.keep_queries, detector[0].to(device), detector[2]["bbox"]
    if count is None or count == model.num_queries:
        return options, None
    if new_parts is not None:
        raise UserError(
            "--keep_queries: found weights that are not loaded from --resume, expected all; fine-tune them first"
        )
    data, seed = options.data, options.run.seed
    dataset = build_dataset(chosen_on, data)
    first = Subset(dataset, range(min(QUERY_IMAGES, len(dataset))))
    loader = build_loader(first, data.batch_size, shuffle=False, num_workers=data.num_workers, seed=seed, device=device)
    ap_before = _measure(options, model, postprocess, device, measured_on, amp, num_images)
    indices = choose_queries(model, loader, count, device=device, amp=amp)
    notice = (
        f"--keep_queries {count}: keeping those of {model.num_queries} queries that find most objects in the first "
        f"{len(first)} images of {chosen_on}; with all queries AP on {measured_on} is {_text(ap_before)}, by "
        f"{evaluator_name()}"
    )
    model.keep_queries(indices)
    detector_config = options.detector.with_values({"num_queries": count})
    most = detector_config.matching_queries * detector_config.num_classes
    postprocess.num_select = min(postprocess.num_select, most)
    options = options.with_values({"num_queries": count, "num_select": postprocess.num_select})
    return options, KeptQueries(indices.tolist(), ap_before, (logging.INFO, notice))


def _measure(
    options: TrainingOptions | SearchOptions,
    model: torch.nn.Module,
    postprocess: PostProcess,
    device: torch.device,
    split: str,
    amp: str,
    num_images: int | None,
) -> float:
    dataset = build_dataset(split, options.data)
    ground_truth = GroundTruth(dataset.annotation_file, dataset.ids[:num_images])
    loader = build_loader(
        Subset(dataset, range(len(dataset.ids[:num_images]))),
        options.data.batch_size,
        shuffle=False,
        num_workers=options.data.num_workers,
        seed=options.run.seed,
        distributed=distributed.is_distributed(),
        device=device,
    )
    return engine.evaluate(model, postprocess, loader, ground_truth, device=device, amp=amp).stats["AP"]


def _text(ap: float) -> str:
    text = shown(ap)
    return text if isinstance(text, str) else f"{text:.4f}"
