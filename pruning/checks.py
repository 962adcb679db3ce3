"""Checks before a search: mAP and targets above 0, and images apart from those of the evaluation."""

from __future__ import annotations

from datasets.coco import Split, split_of
from datasets.config import DataConfig
from datasets.overlap import shared_images
from models.detector import Detector
from pruning.schedule import Schedule
from util.errors import UserError, shorten
from util.logging import get_logger


def lowest_target_ap(schedule: Schedule, base_ap: float, visits: int) -> float:
    """Return the lowest mAP in [0, 1] that a search may accept; `visits` is 0 for all modules at once."""
    if not visits:
        return schedule.fast_threshold_ap(base_ap)
    return min(schedule.target_ap(base_ap, visits - 1), schedule.full_threshold_ap(base_ap, visits - 1))


def check_base_ap(split: Split, resume: str | None, base_ap: float, has_budget: bool) -> None:
    """Raise a `UserError` unless mAP is above 0; with 0, modules would shrink to one unit without a budget."""
    if base_ap < 0:
        raise UserError(f"--search_split {split.name}: found no boxes in its annotations, expected some")
    if base_ap == 0 and not has_budget:
        raise UserError(
            f"--resume {resume}: found mAP 0 on {split.name}, expected a detector that finds the objects of "
            f"{split.annotation_file}"
        )


def check_prunable(model: Detector, scope: str, resume: str | None) -> None:
    """Raise a `UserError` if every module of the scope has width 0."""
    if not model.prunable_modules(scope):
        blocks = ", residual block" if scope == "detector" else ""
        raise UserError(f"--resume {resume}: found no attention and FFN{blocks} above width 0, expected one to prune")


def warn_of_base_ap(base_ap: float) -> None:
    """Warn that no trial can be told from another by mAP."""
    if base_ap == 0:
        get_logger().warning("mAP is 0 before the search: the widths follow the predicted damages alone")


def check_targets(schedule: Schedule, base_ap: float, visits: int) -> None:
    """Raise a `UserError` unless all targets are above 0; see `lowest_target_ap`."""
    target_ap = lowest_target_ap(schedule, base_ap, visits)
    if target_ap <= 0:
        raise UserError(
            f"--decay_points {schedule.points_per_module:g}: found a target of mAP {target_ap:.4f} for the last of "
            f"{visits} modules, from mAP {base_ap:.4f} before the search, expected one above 0: lower the option, or "
            "use --search fast"
        )


def warn_of_low_target(target_ap: float, base_ap: float) -> None:
    """Log a warning if the search may lose more than half of the mAP."""
    if target_ap < base_ap / 2:
        get_logger().warning(
            "the target falls to mAP %.4f, below half of the %.4f before the search", target_ap, base_ap
        )


def warn_of_images(data: DataConfig, split: str, is_calibrated: bool) -> None:
    """Log a warning if AP will be measured on images that the search is fitted to."""
    if split == "val2017":
        if is_calibrated:
            get_logger().warning("calibrating on val2017: for a fair AP, search on train2017 (--search_split)")
        return
    shared = shared_images(split_of(data, "train2017"), split_of(data, "val2017"))
    if shared:
        get_logger().warning(
            "val2017 lists %d of the image files of train2017, first %s: its AP is not a fair measure",
            len(shared), shorten(shared[0], 80),
        )  # fmt: skip
