"""From options and files to a detector: what the scripts do before they train, evaluate or search."""

import argparse
from collections.abc import Collection

import torch

from datasets.annotations import category_names
from datasets.coco import split_of
from models import build_model
from models.criterion import Criterion
from models.detector import Detector
from models.distillation import Distillation
from models.post_process import PostProcess
from util.checkpoint import load_weights
from util.errors import UserError, reason_of, shorten
from weights.checkpoint_file import Checkpoint, read_checkpoint, slim_state_dict
from weights.class_heads import NewParts, class_difference
from weights.safetensors_file import require_safetensors
from weights.stored_options import take_from_checkpoint, take_from_command_line
from weights.unread import refuse_unread

# Without these in common a teacher's classes, queries, pixels or layers are not the student's.
SHARED_WITH_TEACHER = (
    "modelname", "num_classes", "hidden_dim", "enc_layers", "dec_layers", "num_queries", "num_patterns",
    "num_feature_levels", "return_layer", "dilation"
)  # fmt: skip
# Mean distance of the anchors' coordinates: 0.0002 after two epochs of fine-tuning the demo's detector, 0.24 to the
# same anchors in another order.
LARGEST_ANCHOR_DISTANCE = 0.1


def settle_arguments(
    args: argparse.Namespace, typed: Collection[str] = (), *, new_classes: bool = False
) -> tuple[Checkpoint | None, bool]:
    """Read `--resume`, complete `args` from it and from the annotations, and decide whether a training run goes on.

    Afterwards `args.cfgs` is a `Widths` or None and `args.num_classes` is set: what `build_model` reads. The names of
    the detector's categories by id are in `args.categories`.

    Args:
        new_classes: whether a checkpoint may be of other classes than the annotations; one to go on with never may.

    Raises:
        UserError: options, checkpoint and annotations do not agree.
    """
    if args.resume == "":
        raise UserError("--resume: found an empty name, expected the path of a checkpoint, or no --resume")
    if args.save_safetensors:
        require_safetensors()
    checkpoint = None if args.resume is None else read_checkpoint(args.resume)
    continuing = checkpoint is not None and checkpoint.training is not None and not args.eval and not args.start_fresh
    if checkpoint is None:
        take_from_command_line(args)
    else:
        take_from_checkpoint(args, typed, checkpoint, continuing=continuing)
        args.resume = str(checkpoint.path)  # of a folder the file in it
        args.pretrained_backbone = False
    refuse_unread(args, typed)
    if args.modelname == "dn_dab_deformable_detr":
        args.transformer_activation = "relu"  # it has no other, and its checkpoints say so
    splits = ["val2017"] if args.eval else ["val2017", "train2017"]
    args.categories = _categories_of(args, splits)
    args.num_classes = max(args.categories) + 1  # 91 for COCO, whose ids have gaps
    if checkpoint is not None:
        searching = hasattr(args, "search_split")
        # A split need not name all the classes that a detector was trained for, to be measured with it.
        if (args.eval or searching) and checkpoint.num_classes > args.num_classes:
            args.num_classes = checkpoint.num_classes
        difference = class_difference(checkpoint, args.num_classes, args.categories)
        if difference is not None and (continuing or not new_classes):
            hint = "--start_fresh trains its weights" if continuing else "fine-tune it on them (main.py without --eval)"
            raise UserError(f"{checkpoint.path}: {difference}; {hint} with new class heads")
        if args.eval or searching:
            args.categories |= checkpoint.categories or {}
    if continuing and checkpoint.training.get("epoch", 0) >= args.epochs:
        raise UserError(
            f"{checkpoint.path}: its training of {args.epochs} epochs is complete; expected more --epochs to go on, "
            "or --start_fresh to train its weights anew"
        )
    return checkpoint, continuing


def _categories_of(args: argparse.Namespace, splits: Collection[str]) -> dict[int, str]:
    """Category id -> name of all splits together."""
    found: dict[int, str] = {}
    for split in splits:
        path = split_of(args, split).annotation_file
        for number, name in category_names(path).items():
            if found.setdefault(number, name) != name:
                raise UserError(
                    f"{path}: found the name {shorten(name, 80)} for category {number}, expected "
                    f"{shorten(found[number], 80)} as in {split_of(args, splits[0]).annotation_file}"
                )
    return found


def build_detector(
    args: argparse.Namespace, checkpoint: Checkpoint | None, new_parts: NewParts | None = None
) -> tuple[Detector, Criterion, dict[str, PostProcess]]:
    """Model with the checkpoint's weights, cut if it is a search's output; criterion and postprocessors.

    `new_parts` are those that begin anew, if any.

    Raises:
        UserError: the weights do not fit.
    """
    if checkpoint is None:
        return build_model(args)
    state_dict = checkpoint.state_dict
    whole = argparse.Namespace(**{**vars(args), "num_classes": checkpoint.num_classes})
    if checkpoint.is_search:
        # What was pruned before is smaller than the dense network already.
        whole.cfgs = checkpoint.full_widths
    # Of others' files, weights that are to begin anew need not fit what was typed.
    if new_parts is None or checkpoint.kind in ("ours", "search"):
        _check_describes(whole, checkpoint)
    if checkpoint.is_search:
        whole_model, _, _ = build_model(whole)
        state_dict = slim_state_dict(checkpoint, whole_model)
    built = build_model(args)
    if new_parts is not None:
        state_dict = new_parts.fill(state_dict, built[0])
    load_weights(built[0], state_dict, checkpoint.path)
    return built


def arguments_for(args: argparse.Namespace, checkpoint: Checkpoint, typed: Collection[str] = ()) -> argparse.Namespace:
    """Options to build a checkpoint's own detector: `args`, which stay as they are, completed from it alone.

    Raises:
        UserError: a typed option differs from what the checkpoint was made with, or its detector does not read it.
    """
    theirs = argparse.Namespace(**{**vars(args), "pretrained_backbone": False})
    take_from_checkpoint(theirs, typed, checkpoint)
    refuse_unread(theirs, typed)
    theirs.num_classes = checkpoint.num_classes
    return theirs


def _check_describes(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise a `UserError` unless the weights fit the detector that `args` describe, before any memory is taken for it.

    Sizes may come out of the file, and a wrong one can ask for all the memory there is.
    """
    try:
        with torch.device("meta"):
            load_weights(build_model(args)[0], checkpoint.state_dict, checkpoint.path)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(
            f"{checkpoint.path}: found options of no detector ({reason_of(error)}), expected those it was made with"
        ) from None


def build_distillation(args: argparse.Namespace, student: Detector) -> Distillation | None:
    """What `--distill` asks for, its teacher on the student's device; None without it.

    Raises:
        UserError: the teacher's file cannot be read, or it is not the detector that the student was cut from.
    """
    if args.distill is None:
        return None
    if args.distill == "":
        raise UserError("--distill: found an empty name, expected the path of a checkpoint, or no --distill")
    try:
        teacher = _build_teacher(args, student)
    except UserError as error:
        raise UserError(f"--distill {error}") from None
    weights = {
        "loss_distill_logits": args.distill_logits_coef,
        "loss_distill_bbox": args.distill_boxes_coef * args.bbox_loss_coef,
        "loss_distill_giou": args.distill_boxes_coef * args.giou_loss_coef,
        "loss_distill_memory": args.distill_memory_coef,
    }
    return Distillation(teacher.to(next(student.parameters()).device), weights)


def _build_teacher(args: argparse.Namespace, student: Detector) -> Detector:
    checkpoint = read_checkpoint(args.distill)
    if checkpoint.is_search:
        raise UserError(f"{args.distill}: found the output of a search, expected the detector that it pruned")
    theirs = arguments_for(argparse.Namespace(**{**vars(args), "cfgs": None}), checkpoint)
    theirs.padding_rule = args.padding_rule  # the feature pixels of both are compared
    differing = [name for name in SHARED_WITH_TEACHER if getattr(theirs, name) != getattr(args, name)]
    if differing:
        found, expected = (", ".join(f"{name} {getattr(of, name)}" for name in differing) for of in (theirs, args))
        raise UserError(f"{args.distill}: found {found}, expected {expected} as the student has")
    if difference := class_difference(checkpoint, args.num_classes, args.categories):
        raise UserError(f"{args.distill}: {difference}")
    teacher, _, _ = build_detector(theirs, checkpoint)
    with torch.no_grad():
        anchors, expected = (model.refpoint_embed.weight.cpu().sigmoid() for model in (teacher, student))
    distance = float((anchors - expected).abs().mean())
    if distance > LARGEST_ANCHOR_DISTANCE:
        raise UserError(
            f"{args.distill}: found queries that are not the student's (their anchors are {distance:.2f} of an image "
            "apart on average), expected the detector that the student was cut from"
        )
    return teacher
