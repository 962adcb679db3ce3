"""Build a detector from options and a checkpoint, before training, evaluation or search."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from datasets.annotations import category_names
from datasets.coco import split_of
from datasets.config import DataConfig
from models import build
from models.config import DenoisingConfig, DetectorConfig, LossConfig, NetworkConfig, refuse_unused_by_network
from models.criterion import Criterion
from models.detector import Detector
from models.post_process import PostProcess
from util.checkpoint import load_weights
from util.cli import Config
from util.errors import UserError, reason_of, shorten
from weights.checkpoint_file import read_checkpoint, slim_state_dict
from weights.class_heads import NewParts, class_difference
from weights.formats import Checkpoint
from weights.safetensors_file import require_safetensors
from weights.stored_options import take_from_checkpoint

C = TypeVar("C", bound=Config)
D = TypeVar("D", bound=DetectorConfig)

# Teacher and student must share these, or their classes, queries, pixels or layers do not match. The student may have
# fewer decoder layers and queries.
SHARED_WITH_TEACHER = (
    "modelname", "num_classes", "hidden_dim", "enc_layers", "num_patterns",
    "num_feature_levels", "return_layer", "dilation"
)  # fmt: skip
# Mean distance of anchor coordinates: 0.0002 after two epochs of fine-tuning the demo's detector, 0.24 for the same
# anchors in another order.
LARGEST_ANCHOR_DISTANCE = 0.1
# The same, where each anchor of the student is compared with the nearest one of a teacher that has more.
LARGEST_NEAREST_DISTANCE = 0.01


def read_start(resume: str | None, save_safetensors: bool) -> Checkpoint | None:
    """Read the checkpoint of `--resume`, if any.

    Raises:
        UserError: it cannot be read, or the package that --save_safetensors needs is missing.
    """
    if resume == "":
        raise UserError("--resume: found an empty name, expected the path of a checkpoint, or no --resume")
    if save_safetensors:
        require_safetensors()
    return None if resume is None else read_checkpoint(resume)


def with_relu(config: D) -> D:
    """Set the activation of the deformable variant, which only has ReLU."""
    is_deformable = config.modelname == "dn_dab_deformable_detr"
    return config.with_values({"transformer_activation": "relu"}) if is_deformable else config


def with_classes(
    config: D, data: DataConfig, splits: Sequence[str], checkpoint: Checkpoint | None, *, training: bool = False,
    continuing: bool = False,
) -> D:  # fmt: skip
    """Set the detector's classes to those of the annotations and, unless training, those only the checkpoint has.

    Args:
        splits: splits whose annotations are read.
        training: accept a checkpoint with other classes, unless its training is `continuing`.

    Raises:
        UserError: checkpoint and annotations do not agree.
    """
    categories = _categories_of(data, splits)
    num_classes = max(categories) + 1  # 91 for COCO, whose ids have gaps
    if checkpoint is not None:
        # A split to evaluate on may lack some classes of the detector.
        if not training:
            num_classes = max(num_classes, checkpoint.num_classes)
        difference = class_difference(checkpoint, num_classes, categories)
        if difference is not None and (continuing or not training):
            hint = "--start_fresh trains its weights" if continuing else "fine-tune it on them (main.py without --eval)"
            raise UserError(f"{checkpoint.path}: {difference}; {hint} with new class heads")
        if not training:
            categories |= checkpoint.categories or {}
    return config.with_values({"num_classes": num_classes, "categories": categories})


def _categories_of(data: DataConfig, splits: Sequence[str]) -> dict[int, str]:
    """Return category id -> name of all splits together."""
    found: dict[int, str] = {}
    for split in splits:
        path = split_of(data, split).annotation_file
        for number, name in category_names(path).items():
            if found.setdefault(number, name) != name:
                raise UserError(
                    f"{path}: found the name {shorten(name, 80)} for category {number}, expected "
                    f"{shorten(found[number], 80)} as in {split_of(data, splits[0]).annotation_file}"
                )
    return found


def build_detector(
    config: DetectorConfig,
    checkpoint: Checkpoint | None,
    losses: LossConfig | None = None,
    denoising: DenoisingConfig | None = None,
    *,
    freeze_backbone: bool = False,
    new_parts: NewParts | None = None,
) -> tuple[Detector, Criterion, dict[str, PostProcess]]:
    """Build a model with the checkpoint's weights, cut for a search's output; also criterion and postprocessors.

    `new_parts` keep their initial values.

    Raises:
        UserError: the weights do not fit.
    """
    if checkpoint is None:
        return build(config, losses, denoising, freeze_backbone=freeze_backbone)
    state_dict = checkpoint.state_dict
    whole = dataclasses.replace(config, num_classes=checkpoint.num_classes)
    if checkpoint.is_search:
        # A detector pruned before is smaller than the dense network.
        whole = dataclasses.replace(whole, cfgs=checkpoint.full_widths)
    # In foreign files, weights that are not loaded need not fit the typed options.
    if new_parts is None or checkpoint.kind in ("ours", "search"):
        _check_describes(whole, checkpoint)
    if checkpoint.is_search:
        whole_model, _, _ = build(whole)
        state_dict = slim_state_dict(checkpoint, whole_model)
    built = build(config, losses, denoising, freeze_backbone=freeze_backbone)
    if new_parts is not None:
        state_dict = new_parts.fill(state_dict, built[0])
    load_weights(built[0], state_dict, checkpoint.path)
    return built


def options_for(options: C, checkpoint: Checkpoint, typed: Collection[str] = ()) -> C:
    """Complete `options` from the checkpoint, so that they describe its detector.

    Raises:
        UserError: a typed option contradicts the checkpoint, or its detector does not use it.
    """
    options = take_from_checkpoint(options, typed, checkpoint)
    refuse_unused_by_network(NetworkConfig.from_values(options.values()), typed)
    return options.with_values({"pretrained_backbone": False, "num_classes": checkpoint.num_classes})


def _check_describes(config: DetectorConfig, checkpoint: Checkpoint) -> None:
    """Raise a `UserError` unless the weights fit the detector of `config`, before allocating memory for it.

    Sizes may come from the file, and a wrong one could exhaust the memory.
    """
    try:
        with torch.device("meta"):
            load_weights(build(config)[0], checkpoint.state_dict, checkpoint.path)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(
            f"{checkpoint.options_path}: its options describe no detector ({reason_of(error)}), expected those it was "
            "made with"
        ) from None


def build_teacher(path: str, config: DetectorConfig, student: Detector) -> tuple[Detector, Tensor]:
    """Build the detector of `--distill` on the student's device; `config` describes the student.

    Also return the teacher's matching query of each of the student's.

    Raises:
        UserError: its file cannot be read, or it is not the detector that the student was cut from.
    """
    if path == "":
        raise UserError("--distill: found an empty name, expected the path of a checkpoint, or no --distill")
    try:
        teacher = _teacher_of(path, config)
        queries = _queries_of(path, teacher, student)
    except UserError as error:
        raise UserError(f"--distill {error}") from None
    return teacher.to(next(student.parameters()).device), queries


def _teacher_of(path: str, config: DetectorConfig) -> Detector:
    checkpoint = read_checkpoint(path)
    if checkpoint.is_search:
        raise UserError(f"{path}: found the output of a search, expected the detector that it pruned")
    theirs = options_for(dataclasses.replace(config, cfgs=None), checkpoint)
    theirs = dataclasses.replace(theirs, padding_rule=config.padding_rule)  # their feature pixels are compared
    differing = [name for name in SHARED_WITH_TEACHER if getattr(theirs, name) != getattr(config, name)]
    if differing:
        found, expected = (", ".join(f"{name} {getattr(of, name)}" for name in differing) for of in (theirs, config))
        raise UserError(f"{path}: found {found}, expected {expected} as the student has")
    for name, what in (("dec_layers", "decoder layers"), ("num_queries", "queries")):
        found, least = getattr(theirs, name), getattr(config, name)
        if found < least:
            raise UserError(f"{path}: found {found} {what}, expected at least the student's {least}")
    if difference := class_difference(checkpoint, config.num_classes, config.categories or {}):
        raise UserError(f"{path}: {difference}")
    teacher, _, _ = build_detector(theirs, checkpoint)
    return teacher


@torch.no_grad()
def _queries_of(path: str, teacher: Detector, student: Detector) -> Tensor:
    """Return the teacher's matching query of each of the student's, by their anchors.

    Queries of equal number match in order. A student with fewer has some of the teacher's, so each matches the nearest.
    """
    theirs, ours = (model.refpoint_embed.weight.cpu().sigmoid() for model in (teacher, student))
    rows, largest = torch.arange(len(ours)), LARGEST_ANCHOR_DISTANCE
    if len(theirs) > len(ours):
        costs = torch.cdist(ours, theirs, p=1)
        rows, largest = torch.from_numpy(linear_sum_assignment(costs.numpy())[1]), LARGEST_NEAREST_DISTANCE
    distance = float((theirs[rows] - ours).abs().mean())
    if distance > largest:
        raise UserError(
            f"{path}: found other queries than the student's (mean anchor distance {distance:.2f} of an image), "
            "expected the detector that the student was cut from"
        )
    patterns = torch.arange(max(1, teacher.num_patterns)) * len(theirs)  # queries are in the order pattern, anchor
    return (patterns[:, None] + rows).flatten()
