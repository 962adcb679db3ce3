"""Take the first decoder layers of a checkpoint; each layer was trained to give boxes, so they are a detector."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from models.config import NetworkConfig
from util.errors import UserError
from weights.formats import Checkpoint

V = TypeVar("V")

# Parameters of one decoder layer. The deformable variant also has heads for each layer, with numbers in their names.
LAYER = re.compile(r"(?:transformer\.decoder\.layers|(?:transformer\.decoder\.)?bbox_embed|class_embed)\.(\d+)\.")
MODULE = re.compile(r"decoder\.(\d+)\.")


def with_typed_layers(checkpoint: Checkpoint, network: NetworkConfig, typed: Collection[str]) -> Checkpoint:
    """Return the first `--dec_layers` decoder layers of a checkpoint, or all of them without the option.

    Raises:
        UserError: it has fewer.
    """
    found, asked = len(checkpoint.widths.decoder), network.dec_layers
    if "dec_layers" not in typed:
        return checkpoint
    if asked > found:
        raise UserError(f"--dec_layers {asked}: {checkpoint.path} has {found} decoder layers, expected 1 to {found}")
    return first_layers(checkpoint, asked)


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """Return a checkpoint with its first `count` decoder layers only, or itself if it has no more.

    Its training cannot continue, because the optimizer's state is that of all layers.
    """
    found = len(checkpoint.widths.decoder)
    if count >= found:
        return checkpoint
    widths, full, kept = checkpoint.widths.first_layers(count), checkpoint.full_widths, checkpoint.kept
    arguments = {**checkpoint.arguments, "dec_layers": count}
    if arguments.get("cfgs") is not None:
        arguments["cfgs"] = widths.to_list()
    return dataclasses.replace(
        checkpoint,
        state_dict=first_of(LAYER, checkpoint.state_dict, count),
        widths=widths,
        full_widths=None if full is None else full.first_layers(count),
        kept=None if kept is None else first_of(MODULE, kept, count),
        arguments=arguments,
        training=None,
        layers_in_file=checkpoint.layers_in_file or found,
    )


def first_of(pattern: re.Pattern[str], values: Mapping[str, V], count: int) -> dict[str, V]:
    """Return the values whose names `pattern` gives no number, or a number below `count`."""
    return {
        name: value for name, value in values.items() if not (match := pattern.match(name)) or int(match[1]) < count
    }
