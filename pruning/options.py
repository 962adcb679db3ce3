"""Which of the shared options each script reads besides main.py; the others are refused, as they would do nothing."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from util.arguments import ARCHITECTURE, PREFERRED
from util.errors import UserError
from util.options import DATA_OPTIONS, get_args_parser

READ_BY_SEARCH = frozenset(
    {
        *ARCHITECTURE,
        *PREFERRED,
        *DATA_OPTIONS,
        *("output_dir", "coco_path", "resume", "cfgs", "batch_size", "num_workers", "device", "amp", "seed"),
        "tensorboard",
        "save_safetensors",
        # The weights of the loss that ranks channels.
        *("set_cost_class", "set_cost_bbox", "set_cost_giou", "cls_loss_coef", "bbox_loss_coef", "giou_loss_coef"),
        "focal_alpha",
        # A search uses no denoising queries, but the paper's command line has --use_dn: it goes on to the fine-tuning
        # command that the search prints.
        "use_dn",
    }
)
READ_BY_INFERENCE = frozenset(
    {*ARCHITECTURE, *PREFERRED, "output_dir", "resume", "cfgs", "batch_size", "num_workers", "device", "amp"}
)
READ_BY_EXPORT = frozenset(
    {*ARCHITECTURE, "num_select", "batch_norm_type", "padding_rule", "cfgs", "resume", "output_dir"}
)
READ_BY_COST = frozenset(
    {*ARCHITECTURE, "batch_norm_type", "cfgs"} - {"pe_temperatureH", "pe_temperatureW", "anchor_eps"}
)


def hide_unread(parser: argparse.ArgumentParser, read: Collection[str]) -> None:
    """Leave the shared options that are not in `read` out of --help; they are still parsed, so as to be refused."""
    unread = _shared_options() - set(read)
    for action in parser._actions:
        if action.dest in unread:
            action.help = argparse.SUPPRESS


def refuse_unread(typed: Collection[str], read: Collection[str], who: str) -> None:
    """Raise a `UserError` if a shared option was typed that is not in `read`, where `who` is what does not read it."""
    unread = sorted((set(typed) & _shared_options()) - set(read))
    if unread:
        raise UserError(f"--{unread[0]}: {who} does not read it, expected one of the options that --help shows")


def _shared_options() -> set[str]:
    return {action.dest for action in get_args_parser()._actions}
