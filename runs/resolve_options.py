"""Complete the typed options from the checkpoint and the annotations, and check them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from models.config import LossConfig, NoiseConfig, refuse_unused_by_network
from models.detector import Detector
from models.distillation import Distillation
from runs.config import (
    DistillationConfig,
    SearchOptions,
    TrainingConfig,
    TrainingLogConfig,
    TrainingOptions,
)
from runs.depth_search import check_min_layers
from runs.fewer_queries import check_keep_queries
from runs.recipe import recipe_of
from util.cli import options_of, refuse
from util.errors import UserError
from weights.build import build_teacher, read_start, with_classes, with_relu
from weights.decoder_layers import with_typed_layers
from weights.formats import Checkpoint
from weights.stored_options import take_from_checkpoint

# Options of main.py that only training reads.
OF_TRAINING = (
    *options_of(TrainingConfig, DistillationConfig, NoiseConfig, LossConfig, TrainingLogConfig),
    "save_safetensors", "dropout", "start_fresh", "train_json", "train_images",
)  # fmt: skip
OF_CHOICE = ("train_json", "train_images")  # read by --keep_queries, too
OF_DISTILLATION = tuple(name for name in options_of(DistillationConfig) if name != "distill")
NO_TEACHER = "none"  # value of --distill


def resolve_training(
    options: TrainingOptions, typed: Collection[str] = ()
) -> tuple[TrainingOptions, Checkpoint | None, bool]:
    """Read `--resume`; return the completed options, the checkpoint, and whether its training continues.

    The output of a search is fine-tuned by the recipe of `runs.recipe`.

    Raises:
        UserError: options, checkpoint and annotations do not agree, or a typed option would not be used.
    """
    run = options.run
    checkpoint = read_start(run.resume, run.save_safetensors)
    if checkpoint is not None:
        checkpoint = _with_typed_layers(options, typed, checkpoint)
    continuing = checkpoint is not None and checkpoint.training is not None and not run.eval and not run.start_fresh
    if checkpoint is not None:
        options = take_from_checkpoint(options, typed, checkpoint, continuing=continuing)
        options = options.with_values({"resume": str(checkpoint.path), "pretrained_backbone": False})
    elif options.detector.cfgs is not None:
        options = options.with_values({"cfgs": options.detector.widths})  # drops the list of a backbone that is whole
    refuse_unused_by_network(options.detector, typed)
    check_keep_queries(options, checkpoint, continuing=continuing)
    splits = ["val2017"] if run.eval and run.keep_queries is None else ["val2017", "train2017"]
    detector = with_classes(
        with_relu(options.detector), options.data, splits, checkpoint, training=not run.eval, continuing=continuing
    )
    options = dataclasses.replace(options, detector=detector)
    if checkpoint is not None:
        parts = recipe_of(options, typed, checkpoint)
        options = options.with_values({part.name: part.value for part in parts})
    if options.distillation.distill == NO_TEACHER:
        options = options.with_values({"distill": None})
    refuse_unused_by_training(options, typed)
    done = checkpoint.training.get("epoch", 0) if continuing and checkpoint and checkpoint.training else 0
    if checkpoint is not None and done >= options.training.epochs:
        raise UserError(
            f"{checkpoint.path}: {done} epochs of its training are done, and --epochs is {options.training.epochs}; "
            "expected more --epochs to continue, or --start_fresh to train its weights again"
        )
    return options, checkpoint, continuing


def _with_typed_layers(options: TrainingOptions, typed: Collection[str], checkpoint: Checkpoint) -> Checkpoint:
    fewer = with_typed_layers(checkpoint, options.detector, typed)
    if (
        fewer is not checkpoint
        and checkpoint.training is not None
        and not (options.run.eval or options.run.start_fresh)
    ):
        raise UserError(
            f"--dec_layers {options.detector.dec_layers}: {checkpoint.path} holds a training run of "
            f"{len(checkpoint.widths.decoder)} decoder layers, which cannot continue with fewer; expected "
            "--start_fresh to train its weights"
        )
    return fewer


def resolve_search(options: SearchOptions, typed: Collection[str] = ()) -> tuple[SearchOptions, Checkpoint]:
    """Return the completed options of a search, and the checkpoint, read as for an evaluation.

    Raises:
        UserError: options, checkpoint and annotations do not agree, or the network does not use a typed option.
    """
    checkpoint = read_start(options.run.resume, options.run.save_safetensors)
    if checkpoint is None:
        raise UserError("--resume: found none, expected the checkpoint of the detector to prune")
    checkpoint = with_typed_layers(checkpoint, options.detector, typed)
    options = take_from_checkpoint(options, typed, checkpoint)
    refuse_unused_by_network(options.detector, typed)
    check_keep_queries(options, checkpoint)
    check_min_layers(options)
    search = options.search.with_images()
    splits = ["val2017"] if search.split == "val2017" else ["val2017", "train2017"]
    return dataclasses.replace(
        options,
        run=dataclasses.replace(options.run, resume=str(checkpoint.path)),  # for a folder, the file in it
        search=search,
        detector=with_classes(with_relu(options.detector), options.data, splits, checkpoint),
    ), checkpoint  # fmt: skip


def refuse_unused_by_start(options: TrainingOptions, typed: Collection[str]) -> None:
    """Raise a `UserError` for typed options that --eval, or a run without --resume, does not use."""
    run = options.run
    if run.ap_by_layer and not run.eval:
        raise UserError("--ap_by_layer: found no --eval, expected --eval --ap_by_layer")
    if run.eval:
        refuse(["amp"], typed, "--eval does not train, expected --eval_amp")
        unread = OF_TRAINING if run.keep_queries is None else [name for name in OF_TRAINING if name not in OF_CHOICE]
        refuse(unread, typed, "found with --eval, which does not train")
        if run.resume is not None:
            refuse(["seed"], typed, "found with --eval and --resume, where nothing is random")
    if run.resume is None:
        refuse(["start_fresh"], typed, "found no --resume")
    elif options.detector.pretrained_backbone:
        refuse(["pretrained_backbone"], typed, "found with --resume, which has the backbone's weights")


def refuse_unused_by_training(options: TrainingOptions, typed: Collection[str]) -> None:
    """Raise a `UserError` for typed options that the training, completed from the checkpoint, does not use."""
    if options.training.lr_schedule != "step":
        refuse(["lr_drop"], typed, f"found --lr_schedule {options.training.lr_schedule}, expected step")
    if not options.denoising.use_dn:
        refuse(options_of(NoiseConfig), typed, "found --no-use_dn")
    if options.distillation.distill is None:
        refuse(OF_DISTILLATION, typed, "found no --distill")
    elif "denoising" in (options.distillation.distill_queries or ()) and not options.denoising.use_dn:
        raise UserError("--distill_queries denoising: found --no-use_dn, expected --use_dn")


def build_distillation(options: TrainingOptions, student: Detector) -> Distillation | None:
    """Return the distillation of `--distill`, or None without it.

    Raises:
        UserError: the teacher's file cannot be read, or it is not the detector that the student was cut from.
    """
    asked, losses = options.distillation, options.losses
    if asked.distill is None:
        return None
    teacher, queries = build_teacher(asked.distill, options.detector, student)
    weights = {
        "loss_distill_logits": asked.distill_logits_coef,
        "loss_distill_bbox": asked.distill_boxes_coef * losses.bbox_loss_coef,
        "loss_distill_giou": asked.distill_boxes_coef * losses.giou_loss_coef,
        "loss_distill_memory": asked.distill_memory_coef,
    }
    kinds = asked.distill_queries or ["matching"]
    return Distillation(teacher, weights, options.detector.dec_layers, queries, kinds, student.denoising, student)
