"""Cut the weights of the kept channels out of an unpruned detector's state dict.

A slim layer divides its attention logits by the root of its own head width, so query rows are multiplied by
sqrt(kept / full head width): cut and gated models then give the same outputs.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.detector import Detector
from models.layers import OnlyBias
from models.prunable import ParameterSlice, PrunableModule
from models.residual import ResidualBlock
from models.widths import Widths
from pruning.kept_channels import Kept, check_kept, width_of
from util.errors import UserError, one_line

# The index set that cuts each part of a parameter: keys share that of the queries they are multiplied with.
SET_OF_PART = {
    **dict.fromkeys(("query", "key", "position_query", "position_key", "common_key"), "query"),
    **{"value": "value", "hidden": "hidden", "inner": "inner", "inner1": "inner1", "inner2": "inner2"},
}

# The paper's masks are numbered in the order of a layer: `select1` gates the first attention, the last the FFN.
MASK_KEY = re.compile(r"transformer\.(?P<stack>encoder|decoder)\.layers\.(?P<layer>\d+)\.select(?P<place>\d)\.prune_a")
MASKED_BLOCK = {
    ("encoder", "1"): "attention",
    ("encoder", "2"): "ffn",
    ("decoder", "1"): "self_attention",
    ("decoder", "2"): "cross_attention",
    ("decoder", "3"): "ffn",
}


def cut_state_dict(
    state_dict: Mapping[str, Tensor],
    kept: Mapping[str, Kept],
    modules: Mapping[str, PrunableModule],
) -> dict[str, Tensor]:
    """Return a detector's state dict with only the kept channels of each module.

    A module that keeps none leaves only the bias after its channels: what it adds when its gates are 0.

    Args:
        state_dict: weights of the unpruned model, under the names in `modules`.
        kept: kept set of each module to cut; the others stay unpruned.
        modules: the prunable modules of the unpruned model.

    Raises:
        UserError: an unknown module, or a parameter is missing or too small for the kept channels.
    """
    cut = dict(state_dict)
    for name, kept_of_module in kept.items():
        if name not in modules:
            raise UserError(f"kept set: found module {one_line(name, 80)}, expected one of {', '.join(modules)}")
        module = modules[name]
        for piece in module.parameter_slices():
            if piece.key not in cut:
                raise UserError(f"state dict: no {piece.key}, expected it for the kept channels of {name}")
            cut[piece.key] = _cut(cut[piece.key], piece, kept_of_module)
        if not width_of(kept_of_module):
            cut = _without_branch(cut, module)
    return cut


def _without_branch(state_dict: Mapping[str, Tensor], module: PrunableModule) -> dict[str, Tensor]:
    """Return a state dict with only the bias of a module; that of a residual block is its last norm's output for 0."""
    gone = {*(piece.key for piece in module.parameter_slices()), *module.other_keys}
    left = {key: value for key, value in state_dict.items() if key not in gone}
    if isinstance(module.layer, ResidualBlock):
        prefix, norm = module.bias_name, module.layer.last_norm
        assert isinstance(norm.eps, float)
        state = {leaf: state_dict[f"{prefix}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")}
        weight, bias, mean, variance = (tensor.double() for tensor in state.values())
        left[f"{prefix}.bias"] = (bias - mean * weight / (variance + norm.eps).sqrt()).to(state["bias"])
    return left


def slim_copy(model: Detector, state_dict: Mapping[str, Tensor], widths: Widths) -> Detector:
    """Return a copy of a detector with the smaller weights `state_dict`, of the same names, and `widths`."""
    slim = copy.deepcopy(model)
    removed = {name for name, width in widths.items() if not width}
    for name, module in slim.prunable_modules("detector").items():
        if name in removed:
            _remove_branch(slim, module)
    for key, old in [*slim.named_parameters(), *slim.named_buffers()]:
        holder, leaf = slim.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        if state_dict[key].shape != old.shape:
            new = state_dict[key].clone()
            setattr(holder, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if leaf == "weight" and isinstance(holder, nn.Linear):
            holder.out_features, holder.in_features = holder.weight.shape
        elif leaf == "weight" and isinstance(holder, nn.Conv2d):
            holder.out_channels, holder.in_channels = holder.weight.shape[:2]
        elif leaf == "weight" and isinstance(holder, nn.BatchNorm2d):
            holder.num_features = len(holder.weight)
    slim.load_state_dict(state_dict)
    slim.widths = widths
    return slim.eval()


def _remove_branch(model: Detector, module: PrunableModule) -> None:
    """Delete a module's layers, and replace the one whose bias is left."""
    bias = model.get_submodule(module.bias_name).bias
    assert isinstance(bias, Tensor)
    gone = [*(piece.key for piece in module.parameter_slices()), *module.other_keys]
    for key in dict.fromkeys(gone):
        holder, _, leaf = key.rpartition(".")
        delattr(model.get_submodule(holder), leaf)
    _set(model, module.bias_name, OnlyBias(len(bias), is_buffer=not isinstance(bias, nn.Parameter)).to(bias))
    for holder in dict.fromkeys(key.rpartition(".")[0] for key in gone):
        if not model.get_submodule(holder).state_dict():
            parent, _, leaf = holder.rpartition(".")
            delattr(model.get_submodule(parent), leaf)


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def check_kept_sets(modules: Mapping[str, PrunableModule], kept: Mapping[str, Kept], source: str) -> None:
    """Raise a `UserError` naming `source` unless the detector has all modules and channels in `kept`."""
    for name, kept_of_module in kept.items():
        if name not in modules:
            raise UserError(
                f"{source}: found kept channels of {one_line(name, 80)}, expected one of {', '.join(modules)}"
            )
        check_kept(modules[name], kept_of_module, source)


def widths_after(full: Widths, kept: Mapping[str, Kept]) -> Widths:
    """Return the widths of a detector of widths `full` after the cut."""
    widths = full
    for name, kept_of_module in kept.items():
        widths = widths.replace(name, width_of(kept_of_module))
    return widths


def paper_masks_to_kept(state_dict: Mapping[str, Tensor]) -> dict[str, Kept]:
    """Return the kept sets of the masks in the paper's search output.

    `transformer.{encoder,decoder}.layers.N.selectK.prune_a` is 1 x 1 x C; a channel is kept where it is above 0. The
    paper's heads may keep different numbers of channels: a slim attention regroups them into heads in order, which
    changes its outputs.

    Raises:
        UserError: a mask belongs to no module or keeps nothing.
    """
    kept: dict[str, Kept] = {}
    for key, mask in state_dict.items():
        if not key.endswith(".prune_a"):
            continue
        match = MASK_KEY.fullmatch(key)
        block = None if match is None else MASKED_BLOCK.get((match["stack"], match["place"]))
        if match is None or block is None:
            raise UserError(
                f"state dict: found mask {one_line(key, 80)}, expected such as "
                "transformer.encoder.layers.N.select1.prune_a"
            )
        indices = (mask.flatten().float() > 0).nonzero().flatten()  # float8 has no comparison
        if not len(indices):
            raise UserError(f"state dict: {key} keeps no channel, expected at least one value above 0")
        parts = ("hidden",) if block == "ffn" else ("query", "value")
        kept[f"{match['stack']}.{match['layer']}.{block}"] = dict.fromkeys(parts, indices)
    return kept


def _cut(parameter: Tensor, piece: ParameterSlice, kept: Kept) -> Tensor:
    blocks = []
    for (part, block), fold in zip(piece.blocks(parameter), piece.fold, strict=True):
        indices = kept[SET_OF_PART[part]].to(block.device)
        full = block.shape[piece.axis]
        if len(indices) and int(indices.max()) >= full:
            raise UserError(
                f"state dict: found kept channel {int(indices.max())}, expected below {full} for {piece.key}"
            )
        block = block.index_select(piece.axis, indices)
        blocks.append(block * math.sqrt(len(indices) / full) if fold else block)
    return torch.cat(blocks, piece.axis)
