"""Refuse options that a run would not read: who typed one believes that it did something.

Options that a script never reads are not in its parser. These depend on other options or on the checkpoint.
"""

import argparse
from collections.abc import Collection, Iterable

from util.errors import UserError
from weights.options import (
    add_board_option,
    add_distillation_options,
    add_loss_options,
    add_noise_options,
    add_print_option,
    add_safetensors_option,
    add_training_options,
    option_names,
)

OF_DISTILLATION = ("distill_logits_coef", "distill_boxes_coef", "distill_memory_coef")
OF_DEFORMABLE = ("num_feature_levels", "enc_n_points", "dec_n_points")
OF_DENSE = ("pe_temperatureH", "pe_temperatureW")


def names_of_training() -> list[str]:
    """Options of main.py that only training reads."""
    groups = (
        add_training_options, add_distillation_options, add_noise_options, add_loss_options, add_print_option,
        add_board_option, add_safetensors_option,
    )  # fmt: skip
    return [*option_names(*groups), "dropout", "start_fresh", "train_json", "train_images"]


def refuse_unread_by_main(args: argparse.Namespace, typed: Collection[str]) -> None:
    """Raise a `UserError` for options of main.py that --eval, or a run without --resume, does not read."""
    if args.eval:
        _refuse(["amp"], typed, "--eval does not train, expected --eval_amp")
        _refuse(names_of_training(), typed, "found with --eval, which does not train")
    if args.resume is None:
        _refuse(["start_fresh"], typed, "found no --resume")
    elif args.pretrained_backbone:
        _refuse(["pretrained_backbone"], typed, "found with --resume, which has the backbone's weights")


def refuse_unread(args: argparse.Namespace, typed: Collection[str]) -> None:
    """Raise a `UserError` for options that the network, or the training, does not read.

    Args:
        args: options of any script, completed from the checkpoint.
        typed: names of those that were typed.
    """
    if args.modelname == "dn_dab_detr":
        _refuse(OF_DEFORMABLE, typed, "dn_dab_detr has one level and no points, expected dn_dab_deformable_detr (-m)")
    else:
        _refuse(OF_DENSE, typed, f"{args.modelname} has the temperature 10000, expected dn_dab_detr (-m)")
        if args.transformer_activation != "relu":
            _refuse(["transformer_activation"], typed, f"found prelu, expected relu, which {args.modelname} has")
    if args.dilation and args.return_layer != "layer4":
        _refuse(["dilation"], typed, f"found --return_layer {args.return_layer}, expected layer4, which it dilates")
    if args.lr_schedule != "step":
        _refuse(["lr_drop"], typed, f"found --lr_schedule {args.lr_schedule}, expected step")
    if not args.use_dn:
        _refuse(option_names(add_noise_options), typed, "found --no-use_dn")
    if args.distill is None:
        _refuse(OF_DISTILLATION, typed, "found no --distill")


def _refuse(names: Iterable[str], typed: Collection[str], reason: str) -> None:
    found = [f"--{name}" for name in names if name in typed]
    if found:
        raise UserError(f"{', '.join(found)}: {reason}")
