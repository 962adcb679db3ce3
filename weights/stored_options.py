"""Which options come out of a checkpoint, and which of those typed contradict it."""

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from models import check_widths, full_widths
from models.layers import ANCHOR_EPS
from models.widths import Widths
from util.errors import UserError, shorten
from weights.checkpoint_file import Checkpoint
from weights.options import DATA_OPTIONS, get_args_parser

# They decide the shapes or the function of the network; a typed one must agree with the checkpoint's.
ARCHITECTURE = (
    "modelname",
    "backbone",
    "dilation",
    "return_layer",
    "hidden_dim",
    "nheads",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "num_queries",
    "num_patterns",
    "num_feature_levels",
    "enc_n_points",
    "dec_n_points",
    "transformer_activation",
    "pe_temperatureH",
    "pe_temperatureW",
    "anchor_eps",
)
# What checkpoints mean that do not tell it.
OF_OLDER_CHECKPOINTS = {"anchor_eps": ANCHOR_EPS}
# They come with the checkpoint, but another value typed is a wish, not a mistake.
PREFERRED = ("image_size", "num_select", "batch_norm_type", "padding_rule")
# They belong to one run and are never taken from a checkpoint.
OF_THE_RUN = (
    "coco_path",
    *DATA_OPTIONS,
    "output_dir",
    "resume",
    "start_fresh",
    "finetune_ignore",
    "eval",
    "save_results",
    "save_safetensors",
    "device",
    "num_workers",
    "cfgs",
    "print_freq",
    "tensorboard",
)


def take_from_checkpoint(
    args: argparse.Namespace, typed: Collection[str], checkpoint: Checkpoint, *, continuing: bool = False
) -> None:
    """Set in `args` what the checkpoint knows: its architecture, and on `continuing` its run all options not typed.

    `args.cfgs` becomes the widths of the model to build, None for a dense one that was not asked for by `--cfgs`.

    Raises:
        UserError: a typed option, or `--cfgs`, differs from what the checkpoint was made with.
    """
    stored = {**OF_OLDER_CHECKPOINTS, **checkpoint.arguments}
    if stored.get("modelname") == "dn_dab_deformable_detr":
        stored["transformer_activation"] = "relu"  # it has no other, whatever the option's default was
    options = {action.dest: action for action in get_args_parser()._actions}
    # What foreign files tell of themselves may be wrong, so what is typed wins; if it does not fit, the weights tell.
    binding = ARCHITECTURE if checkpoint.kind in ("ours", "search") else ()
    others = set(stored) - {*binding, *OF_THE_RUN} if continuing or not binding else PREFERRED
    for name in (*binding, *sorted(others)):
        if name not in stored or name not in vars(args):
            continue
        if name not in typed:
            if name in options:
                _check_stored(options[name], stored[name], checkpoint.path)
            setattr(args, name, stored[name])
        elif name in (*binding, "modelname") and getattr(args, name) != stored[name]:
            theirs = shorten(stored[name]).strip("'")
            raise UserError(f"--{name} {getattr(args, name)}: {checkpoint.path} was made with {theirs}")
    for name, layers in (("enc_layers", checkpoint.widths.encoder), ("dec_layers", checkpoint.widths.decoder)):
        if getattr(args, name) != len(layers):
            raise UserError(
                f"{checkpoint.path}: found {len(layers)} {'en' if name == 'enc_layers' else 'de'}coder layers, "
                f"expected {getattr(args, name)} (--{name})"
            )
    typed_widths = None if args.cfgs is None else check_widths(Widths.parse(args.cfgs), args)
    if typed_widths is not None or checkpoint.widths != full_widths(args) or stored.get("cfgs") is not None:
        try:
            args.cfgs = check_widths(checkpoint.widths, args)
        except UserError as error:
            raise UserError(f"{checkpoint.path}: {str(error).removeprefix('--cfgs: ')}") from None
        if typed_widths not in (None, args.cfgs):
            raise UserError(f"--cfgs {typed_widths}: {checkpoint.path} has the widths {checkpoint.widths}")


def _check_stored(option: argparse.Action, value: Any, path: Path) -> None:
    """Raise a `UserError` unless `value` is one that the option could have got on a command line."""
    shown = f"{path}: found {shorten(value)} under `args.{option.dest}`"
    if option.choices is not None:
        if value not in option.choices:
            raise UserError(f"{shown}, expected one of {', '.join(map(str, option.choices))}")
    elif option.type in (None, os.path.expanduser):
        if isinstance(option.default, bool) and not isinstance(value, bool):
            raise UserError(f"{shown}, expected True or False")
        if not isinstance(option.default, bool) and not isinstance(value, str | None):
            raise UserError(f"{shown}, expected text")
    else:
        try:
            if type(value) not in (int, float):
                raise ValueError
            option.type(str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{shown}, {str(error).partition(': ')[2]}") from None
        except ValueError:
            raise UserError(f"{shown}, expected a {option.type.__name__}") from None


def take_from_command_line(args: argparse.Namespace) -> None:
    """Without a checkpoint: `args.cfgs` becomes the widths typed, or None."""
    if args.cfgs is not None:
        args.cfgs = check_widths(Widths.parse(args.cfgs), args)
