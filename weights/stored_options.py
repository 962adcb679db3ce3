"""Take options from a checkpoint, and check that typed ones agree with it."""

from collections.abc import Collection
from typing import TypeVar

from models.config import NetworkConfig
from models.layers import ANCHOR_EPS
from models.widths import Widths
from util.cli import Config, options_of
from util.errors import UserError, shorten
from weights.formats import Checkpoint

C = TypeVar("C", bound=Config)

# Values of options that a checkpoint does not store.
OF_OLDER_CHECKPOINTS = {"anchor_eps": ANCHOR_EPS}


def take_from_checkpoint(options: C, typed: Collection[str], checkpoint: Checkpoint, *, continuing: bool = False) -> C:
    """Return `options` with the checkpoint's network and, if its training continues, all its untyped options.

    `cfgs` become the widths of the model to build, or None for a dense one without `--cfgs`.

    Raises:
        UserError: a typed option differs from what the checkpoint was made with, or a stored value is invalid.
    """
    stored = {**OF_OLDER_CHECKPOINTS, **_layers_of(checkpoint, typed), **checkpoint.arguments}
    if stored.get("modelname") == "dn_dab_deformable_detr":
        stored["transformer_activation"] = "relu"  # its only one, whatever the option's default was
    # Options in foreign files may be wrong, so typed ones override them; loading the weights checks them.
    is_ours = checkpoint.kind in ("ours", "search")
    values, taken = options.values(), {}
    for name, field in options_of(type(options)).items():
        role = field.metadata["stored"]
        if name not in stored or role == "run":
            continue
        if name not in typed:
            if role != "training" or continuing or not is_ours:
                taken[name] = stored[name]
        elif values[name] != stored[name] and (name == "modelname" or (is_ours and role == "network")):
            theirs = shorten(stored[name]).strip("'")
            raise UserError(f"--{name} {values[name]}: {checkpoint.options_path} was made with {theirs}")
    options = options.with_values(taken, checkpoint.options_path)
    network = NetworkConfig.from_values(options.values())
    for stack, found in (("enc", checkpoint.widths.encoder), ("dec", checkpoint.widths.decoder)):
        expected = getattr(network, f"{stack}_layers")
        if len(found) != expected:
            raise UserError(
                f"{checkpoint.options_path}: found {len(found)} {stack}oder layers, expected {expected} "
                f"(--{stack}_layers)"
            )
    return options.with_values({"cfgs": _widths_to_build(network, checkpoint, stored.get("cfgs") is not None)})


def _layers_of(checkpoint: Checkpoint, typed: Collection[str]) -> dict[str, int]:
    """Return the untyped numbers of layers, as the weights have them."""
    found = {"enc_layers": len(checkpoint.widths.encoder), "dec_layers": len(checkpoint.widths.decoder)}
    return {name: layers for name, layers in found.items() if name not in typed}


def _widths_to_build(network: NetworkConfig, checkpoint: Checkpoint, has_slim_names: bool) -> Widths | None:
    found = checkpoint.widths
    typed = None if network.cfgs is None else network.widths
    if typed is None and found == network.full_widths and not has_slim_names:
        return None
    try:
        found = network.check_widths(found)
    except UserError as error:
        raise UserError(f"{checkpoint.options_path}: {str(error).removeprefix('--cfgs: ')}") from None
    if typed not in (None, found):
        raise UserError(f"--cfgs {typed}: {checkpoint.options_path} has the widths {found}")
    return found
