"""Load weights into a model, under any of the parameter names in use."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from util.errors import UserError, one_line

T = TypeVar("T")

ENCODER_ATTENTION = re.compile(r"(.*encoder\.layers\.\d+\.)(?:self_attn\.)?((?:in_proj_|out_proj\.)(?:weight|bias))$")
LAYER = re.compile(r"(?:transformer\.)?(encoder|decoder)\.layers\.(\d{1,4})\.")  # few digits: callers loop over layers
SHOWN_KEYS = 3
BOX_HEADS = ("bbox_embed.", "transformer.decoder.bbox_embed.")


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path = "checkpoint") -> None:
    """Load weights of any format and floating point type into `model`; if they do not fit, nothing is changed.

    For a model on the meta device, the weights are only checked.

    The encoder's attention may have dense or slim names, one of the box head's two names is enough, and BatchNorm's
    batch counters may be missing or superfluous.

    Raises:
        UserError: the weights do not fit; names `source`, the first such keys, and the shapes found and expected.
    """
    expected = model.state_dict()
    slim_names = any(ENCODER_ATTENTION.match(key) and ".self_attn." not in key for key in expected)
    found = rename_encoder_attention(strip_module(state_dict), slim_names)
    for one, other in (BOX_HEADS, BOX_HEADS[::-1]):
        for key in [key for key in found if key.startswith(one)]:
            found.setdefault(other + key[len(one) :], found[key])
    for key in expected.keys() | found.keys():
        if key.endswith("num_batches_tracked"):
            if key not in expected:
                found.pop(key)
            elif key not in found:
                found[key] = expected[key]
    _check_fit(found, expected, source)
    if not any(value.is_meta for value in expected.values()):
        model.load_state_dict(found)


def rename_encoder_attention(state_dict: Mapping[str, T], slim: bool) -> dict[str, T]:
    """Rename the encoder's attention to slim names (`N.in_proj_weight`) or dense names (`N.self_attn...`)."""
    middle = r"\1\2" if slim else r"\1self_attn.\2"
    return {ENCODER_ATTENTION.sub(middle, key): value for key, value in state_dict.items()}


def strip_module(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove DistributedDataParallel's prefix `module.` from the names."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def count_layers(state_dict: Mapping[str, Any], stack: str) -> int:
    """Return the number of `encoder` or `decoder` layers, by the keys."""
    numbers = [int(match[2]) for match in map(LAYER.match, state_dict) if match and match[1] == stack]
    return max(numbers, default=-1) + 1


def shape_text(tensor: Tensor) -> str:
    """Return a tensor's shape as text, such as `3 x 4`."""
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise a `UserError` with the first differences in keys, shapes and types, and the number of the others."""
    faults = [
        f"{key} has the shape {shape_text(found[key])}, expected {shape_text(value)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    faults += [
        f"{key} holds {found[key].dtype}, expected floating point numbers"
        for key, value in expected.items()
        if key in found and value.is_floating_point() and not found[key].is_floating_point()
    ]
    faults += [f"{key} is missing, expected {shape_text(value)}" for key, value in expected.items() if key not in found]
    faults += [
        f"{one_line(key, 80)} ({shape_text(value)}) is not in the model"
        for key, value in found.items()
        if key not in expected
    ]
    if not faults:
        return
    counts = {stack: (count_layers(found, stack), count_layers(expected, stack)) for stack in ("encoder", "decoder")}
    layers = [
        f"{ours} {stack} layers, expected {theirs} (--{stack[:3]}_layers)"
        for stack, (ours, theirs) in counts.items()
        if ours != theirs
    ]
    more = f"; and {len(faults) - SHOWN_KEYS} more" if len(faults) > SHOWN_KEYS else ""
    shown = "; ".join([f"found {line}" for line in layers] + faults[:SHOWN_KEYS])
    raise UserError(f"{source}: its weights do not fit the model: {shown}{more}")
